// adamw.cu -- one step of AdamW over a range of a parameter store.
//
//     h <- scale g
//     m <- beta1 m + (1 - beta1) h
//     v <- beta2 v + (1 - beta2) h^2
//     p <- p - lr weight_decay p - lr (correction1 m) / (sqrt(correction2 v) + eps)
//
// Buffers    p, m, v read and written, g read: n elements each, not overlapping. At step t = 1, 2, ...
//            the caller gives correction = 1 / (1 - beta^t). `scale` is 1 / (sum of loss weights),
//            times the factor of clipping.
// Launch     ELEMENTS, work = n, any grid and block.
// Cost       28 n bytes of memory traffic in float32, 15 n flops with a root and a division: bandwidth.
// Exactness  no sums: the same bits for every launch shape and split.
// Source     I. Loshchilov and F. Hutter, Decoupled weight decay regularization, ICLR 2019, alg. 2.
// Reference  tests/reference.py    Test  tests/test_kernels_adamw.py

#include "kernel.h"

ELEMENTS_KERNEL adamw(real* __restrict__ p, const real* __restrict__ g, real* __restrict__ m,
                      real* __restrict__ v, double lr, double beta1, double beta2, double eps,
                      double weight_decay, double correction1, double correction2, double scale,
                      int64 n)
{
    const real keep1 = (real)beta1, take1 = (real)(1 - beta1);
    const real keep2 = (real)beta2, take2 = (real)(1 - beta2);
    const real rate = (real)(lr * correction1), unbias = (real)correction2, floor = (real)eps;
    const real decay = (real)(lr * weight_decay), factor = (real)scale;
    GRID_STRIDE(i, n) {
        const real gradient = factor * g[i];
        const real mean = keep1 * m[i] + take1 * gradient;
        const real square = keep2 * v[i] + take2 * gradient * gradient;
        m[i] = mean;
        v[i] = square;
        p[i] = p[i] - decay * p[i] - rate * mean / (real_sqrt(unbias * square) + floor);
    }
}
