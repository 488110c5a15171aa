"""SDPoint on one screen (Kuen et al. 2018): train one network at all of its costs, measure each, pick one for a budget.

Of the package it uses `SDPointNet` alone, which runs a network as an instance: a downsampling point and a ratio.
`python examples/sdpoint.py` takes a minute of processor time.
"""

import functools
import random

import jax
import numpy as np
import optax
import tqdm
from flax import linen as nn
from sklearn.datasets import load_digits

from sdpoint_jax import SDPointNet


class Stem(nn.Module):
    features: int

    @nn.compact
    def __call__(self, images, train):
        return nn.Conv(self.features, (3, 3), use_bias=False)(images)


class Block(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        # With momentum 0 the statistics are the moments of one batch: `reestimate` pools them, training ignores them.
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.0)
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        y = nn.relu(norm()(x))
        shortcut = x if self.stride == 1 else conv((1, 1), strides=self.stride)(y)
        y = nn.relu(norm()(conv((3, 3), strides=self.stride)(y)))
        return shortcut + conv((3, 3))(y)  # The downsampling point comes here, right after the addition.


class Head(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.0)(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))  # The mean takes a map of any size.


class Net(SDPointNet):
    sizes: tuple[tuple[int, int], ...] = ((16, 1), (16, 1), (32, 2), (32, 1))  # Features and stride of each block.

    def setup(self):
        self.stem = Stem(self.sizes[0][0])
        self.blocks = [Block(features, stride) for features, stride in self.sizes]
        self.head = Head(self.num_classes)


def draw(seed, step, instances):
    """Draw the instance of a step: a point uniformly, full resolution among them, then one of its ratios."""
    # A function of (seed, step) alone, so a resumed run, or each of several hosts, draws the same.
    uniform = random.Random(f"sdpoint {seed} {step}").random
    points = list(dict.fromkeys(instance.point for instance in instances))
    point = points[int(uniform() * len(points))]
    at_point = [instance for instance in instances if instance.point == point]
    return at_point[int(uniform() * len(at_point))]


def loss_of(params, images, labels, model, instance):
    """Return the loss of an instance. All instances have the same parameters; BatchNorm uses the batch's statistics."""
    logits, _ = model.apply({"params": params}, images, instance=instance, train=True, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# The instance is static, because shapes depend on it: each one is a program of its own, compiled on first use.
@functools.partial(jax.jit, static_argnames=("model", "instance", "optimizer"))
def train_step(params, opt_state, images, labels, model, instance, optimizer):
    grads = jax.grad(loss_of)(params, images, labels, model, instance)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def reestimate(params, batches, model, instance):
    """Return the BatchNorm statistics of an instance: exact moments, pooled over batches of training images."""

    # Statistics differ between instances, parameters do not. A running average of training would mix the instances.
    def pool(*norms):
        mean = sum(norm["mean"] for norm in norms) / len(norms)
        return {"mean": mean, "var": sum(norm["var"] + norm["mean"] ** 2 for norm in norms) / len(norms) - mean**2}

    run = jax.jit(functools.partial(model.apply, instance=instance, train=True, mutable=["batch_stats"]))
    moments = [run({"params": params}, images)[1]["batch_stats"] for images in batches]
    return jax.tree.map(pool, *moments, is_leaf=lambda node: "mean" in node)


def count_macs(jaxpr):
    """Return the multiply-accumulates of convolutions and matrix products in a trace, pools at points left out."""
    total = 0
    for eqn in (eqn for eqn in jaxpr.eqns if "sdpoint_pool" not in str(eqn.source_info.name_stack)):
        if eqn.primitive.name == "conv_general_dilated":  # A kernel is [height, width, in, out].
            total += eqn.outvars[0].aval.size * np.prod(eqn.invars[1].aval.shape[:-1])
        elif eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            total += eqn.outvars[0].aval.size * np.prod([eqn.invars[0].aval.shape[axis] for axis in contracted])
        inner = (getattr(value, "jaxpr", value) for value in eqn.params.values())
        total += sum(count_macs(jaxpr) for jaxpr in inner if hasattr(jaxpr, "eqns"))
    return total


def pick(table, max_macs):
    """Return the most accurate row (name, MACs, top-1) within the budget; of equally accurate ones the cheapest."""
    return max((row for row in table if row[1] <= max_macs), key=lambda row: (row[2], -row[1]), default=None)


def main(steps=800, batch_size=64, reestimate_batches=20, budget=0.5, seed=0, sizes=Net.sizes):
    digits = load_digits()
    images, labels = (digits.images[..., None].astype(np.float32) / 16 - 0.305) / 0.376, digits.target
    is_test = np.arange(len(images)) % 5 == 0
    padded, train_labels = np.pad(images[~is_test], [(0, 0), (1, 1), (1, 1), (0, 0)]), labels[~is_test]

    def batch(seed, step):  # Random training images, all shifted alike by up to one pixel.
        rng = np.random.default_rng((seed, step))
        chosen, (down, right) = rng.integers(len(padded), size=batch_size), rng.integers(3, size=2)
        return padded[chosen, down : down + 8, right : right + 8], train_labels[chosen]

    model = Net(num_classes=10, sizes=sizes)
    params = jax.jit(functools.partial(model.init, train=False))(jax.random.key(seed), images[:1])["params"]
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(optax.cosine_decay_schedule(0.1, steps), 0.9))
    opt_state = optimizer.init(params)
    for step in tqdm.trange(steps, desc="training"):
        instance = draw(seed, step, model.instances())
        params, opt_state = train_step(params, opt_state, *batch(seed, step), model, instance, optimizer)
    table = []
    for instance in model.instances():
        # From augmented images, as training sees them: on clean ones, statistics and accuracy are others.
        batches = [batch(seed + 1, step)[0] for step in range(reestimate_batches)]
        variables = {"params": params, "batch_stats": reestimate(params, batches, model, instance)}
        run = jax.jit(functools.partial(model.apply, instance=instance, train=False))
        macs = int(count_macs(jax.make_jaxpr(run)(variables, images[:1]).jaxpr))
        accuracy = float(np.mean(np.argmax(run(variables, images[is_test]), -1) == labels[is_test]))
        table.append((instance.name, macs, accuracy))
        print(f"{instance.name:<10}{macs:>12,} MACs{macs / table[0][1]:>8.0%} of full{accuracy:>10.2%} top-1")
    print(f"within {budget:.0%} of the MACs:", pick(table, budget * table[0][1]))  # The first row is full resolution.
    return table


if __name__ == "__main__":
    main()
