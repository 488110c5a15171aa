"""Serves a sweep's artefact over HTTP: python -m sdpoint_jax serve runs/digits/sweep/artefact --objective-ms=100

Each request is answered on the most accurate instance that keeps the objective under the present load; what could not
be answered in time is refused at once. Needs the extra: pip install 'sdpoint_jax[serve]', and latencies of this device:
python -m sdpoint_jax profile ARTEFACT. SIGTERM or Ctrl-C answers what was accepted, then ends with code 0.
"""

import argparse
import signal
import sys

from sdpoint_jax.cli.parser import comma_separated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("artefact", help="as runs/digits/sweep/artefact")
    parser.add_argument("--objective-ms", type=float, default=100.0, help="time for an answer; 100 by default")
    parser.add_argument("--policy", default="headroom", help="how instances are chosen; see the controller")
    parser.add_argument("--instances", default="pareto", help="pareto (default), all, or names with commas between")
    parser.add_argument("--batch-sizes", default="", help="of those that were profiled; all by default")
    parser.add_argument("--max-queue", type=int, default=1024, help="requests that may wait; 1024 by default")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; this machine alone by default")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one; 8000 by default")
    parser.add_argument("--token", default="", help="allows PUT /budget to who sends it; without one there is no such")
    parser.add_argument("--max-upload-mb", type=float, default=16.0, help="largest body of a request")
    parser.add_argument("--device", help="whose profile to use; by default the only one in the artefact")


def run(args: argparse.Namespace) -> None:
    """Serves until it is told to stop."""
    try:
        import uvicorn

        from sdpoint_jax.serving.server import Limits, create_app
    except ImportError as error:
        raise ImportError(f"{error}: serving needs the extra, pip install 'sdpoint_jax[serve]'") from None
    import numpy as np

    from sdpoint_jax.serving.controller import Controller, LatencyTable
    from sdpoint_jax.serving.engine import Engine
    from sdpoint_jax.serving.predictor import Predictor

    predictor = Predictor.load(args.artefact)
    sizes = comma_separated(args.batch_sizes, int, "batch-sizes") or None
    table = LatencyTable.from_rows(predictor.rows, device=args.device, runtime="xla", batch_sizes=sizes)
    names = [table.names[i] for i in table.front(range(len(table.names)))]
    if args.instances != "pareto":
        names = list(table.names) if args.instances == "all" else args.instances.split(",")
    rows = [table.rows[table.index_of(name)] for name in dict.fromkeys(names)]
    table = LatencyTable(rows, table.setting, table.batch_sizes)
    controller = Controller(table, policy=args.policy, objective=args.objective_ms / 1e3, max_queue=args.max_queue)

    def prepare():
        predictor.compile(table.names, table.batch_sizes)
        for name in table.names:
            for size in table.batch_sizes:  # The first run of a program takes longer.
                predictor.predict(np.zeros((size, *predictor.image_shape), np.uint8), instance=name)
        print(f"ready: {len(table.names)} instances at batch sizes {table.batch_sizes}", file=sys.stderr, flush=True)

    app = create_app(
        predictor,
        Engine(predictor, controller),
        prepare=prepare,
        token=args.token or None,
        limits=Limits(body_bytes=int(args.max_upload_mb * (1 << 20))),
    )
    sys.setswitchinterval(0.0003)  # Of Python's 5 ms, the event loop would lose several for each image that is decoded.
    signal.signal(signal.SIGTERM, lambda *_: None)  # Uvicorn sends it again when it has ended in peace.
    signal.signal(signal.SIGINT, lambda *_: None)
    print(f"serving {args.artefact} at http://{args.host}:{args.port}", file=sys.stderr, flush=True)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,
        limit_concurrency=4096,
        timeout_keep_alive=10,
        server_header=False,
    )
