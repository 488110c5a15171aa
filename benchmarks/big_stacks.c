// Gives every thread of a process a stack of 1 GiB. Compilers of libtpu may need it: that of 0.0.42.1 overflows the fixed
// stack of one of its threads (signal 11) at the gradients of ResNet-50 for v6e.
//
//     cc -shared -fPIC -o big_stacks.so benchmarks/big_stacks.c -ldl
//     LD_PRELOAD=$PWD/big_stacks.so python benchmarks/aot.py --target=tpu:v6e:2x2 --net=resnet50:224:128
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>

typedef int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

int pthread_create(pthread_t *thread, const pthread_attr_t *given, void *(*start)(void *), void *argument) {
    create create_thread = (create)dlsym(RTLD_NEXT, "pthread_create");
    pthread_attr_t attributes;
    int detached = PTHREAD_CREATE_JOINABLE;
    if (given) pthread_attr_getdetachstate(given, &detached);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, detached);
    pthread_attr_setstacksize(&attributes, (size_t)1 << 30);
    int error = create_thread(thread, &attributes, start, argument);
    pthread_attr_destroy(&attributes);
    return error;
}
