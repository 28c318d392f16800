// sgd.cu -- one step of stochastic gradient descent with momentum over a range of a parameter store.
//
//     p <- p - lr weight_decay p
//     v <- momentum v + scale g
//     p <- p - lr v                          nesterov = 0
//     p <- p - lr (scale g + momentum v)     nesterov = 1
//
// Buffers    p, v read and written, g read: n elements each, not overlapping. v may be null, which
//            means momentum 0. `scale` is 1 / (sum of loss weights), times the factor of clipping.
// Launch     ELEMENTS, work = n, any grid and block.
// Cost       20 n bytes of memory traffic in float32 (12 n without v), 8 n flops: bandwidth.
// Exactness  no sums: the same bits for every launch shape and split.
// Source     I. Sutskever et al., On the importance of initialization and momentum in deep learning,
//            ICML 2013, with lr outside the velocity; decay as in Loshchilov and Hutter (adamw.cu).
// Reference  tests/reference.py    Test  tests/test_kernels_sgd.py

#include "kernel.h"

ELEMENTS_KERNEL sgd(wide* __restrict__ p, const wide* __restrict__ g, wide* __restrict__ v,
                    double lr, double momentum, double weight_decay, double scale, int32 nesterov,
                    int64 n)
{
    const wide rate = (wide)lr, mu = (wide)momentum, factor = (wide)scale;
    const wide decay = (wide)(lr * weight_decay);
    if (!v) {
        GRID_STRIDE(i, n) p[i] = p[i] - decay * p[i] - rate * (factor * g[i]);
        return;
    }
    if (nesterov) {
        GRID_STRIDE(i, n) {
            const wide gradient = factor * g[i];
            v[i] = mu * v[i] + gradient;
            p[i] = p[i] - decay * p[i] - rate * (gradient + mu * v[i]);
        }
    } else {
        GRID_STRIDE(i, n) {
            v[i] = mu * v[i] + factor * g[i];
            p[i] = p[i] - decay * p[i] - rate * v[i];
        }
    }
}
