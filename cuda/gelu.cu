// gelu.cu -- the Gaussian error linear unit, tanh form.
//
//     u(x) = sqrt(2 / pi) (x + 0.044715 x^3)
//     gelu_forward    y[i] <- x[i] (1 + tanh(u)) / 2 = x[i] / (1 + e^(-2 u))
//     gelu_backward   dx[i] <- dy[i] (s + x s (1 - s) 2 u'(x)),  s = 1 / (1 + e^(-2 u))
//
// Buffers    n elements each; an output may be the same array as an input, no other overlap.
// Launch     ELEMENTS, work = n, any grid and block.
// Cost       8 n bytes forward, 12 n backward in float32; about 25 flops and one division an element.
// Exactness  no sums: the same bits for every launch shape and split. The form with e^(-2 u) keeps
//            full relative precision for negative x, where 1 + tanh(u) cancels. y(-inf) is NaN.
// Source     D. Hendrycks and K. Gimpel, Gaussian error linear units, arXiv:1606.08415.
// Reference  tests/reference.py    Test  tests/test_kernels_gelu.py

#include "kernel.h"

#define CUBIC 0.044715
#define MINUS_TWO_ROOT -1.5957691216057307118  // -2 sqrt(2 / pi)

// e^(-2 u(x))
DEVICE wide gelu_power(wide x)
{
    return real_exp(x * real_fma(x * x, (wide)(MINUS_TWO_ROOT * CUBIC), (wide)MINUS_TWO_ROOT));
}

ELEMENTS_KERNEL gelu_forward(const real* x, real* y, int64 n)
{
    GRID_STRIDE(i, n) {
        const wide t = x[i];
        y[i] = t / (1 + gelu_power(t));
    }
}

ELEMENTS_KERNEL gelu_backward(const real* x, const real* dy, real* dx, int64 n)
{
    const wide far = sizeof(wide) == 4 ? 10 : 21;  // s is 0 or 1 there, and e^(-2 u) still finite
    GRID_STRIDE(i, n) {
        wide t = x[i];
        t = t > far ? far : t;
        t = t < -far ? -far : t;
        const wide power = gelu_power(t), s = 1 / (1 + power);
        const wide slope =
            real_fma(t * t, (wide)(-3 * MINUS_TWO_ROOT * CUBIC), (wide)-MINUS_TWO_ROOT);
        dx[i] = dy[i] * real_fma(t * slope * (power * s), s, s);  // power s = 1 - s, not cancelled
    }
}
