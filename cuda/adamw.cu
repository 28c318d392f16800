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

ELEMENTS_KERNEL adamw(wide* __restrict__ p, const wide* __restrict__ g, wide* __restrict__ m,
                      wide* __restrict__ v, double lr, double beta1, double beta2, double eps,
                      double weight_decay, double correction1, double correction2, double scale,
                      int64 n)
{
    const wide keep1 = (wide)beta1, take1 = (wide)(1 - beta1);
    const wide keep2 = (wide)beta2, take2 = (wide)(1 - beta2);
    const wide rate = (wide)(lr * correction1), unbias = (wide)correction2, floor = (wide)eps;
    const wide decay = (wide)(lr * weight_decay), factor = (wide)scale;
    GRID_STRIDE(i, n) {
        const wide gradient = factor * g[i];
        const wide mean = keep1 * m[i] + take1 * gradient;
        const wide square = keep2 * v[i] + take2 * gradient * gradient;
        m[i] = mean;
        v[i] = square;
        p[i] = p[i] - decay * p[i] - rate * mean / (real_sqrt(unbias * square) + floor);
    }
}
