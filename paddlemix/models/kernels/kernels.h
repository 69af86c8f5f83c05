/* What cpu_kernels.c and attention_kernels.c share: exponentials, sums, softmax and turns of a row. */
#ifndef PADDLEMIX_KERNELS_H
#define PADDLEMIX_KERNELS_H
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

/* cblas_sgemm of the library that paddle's own products use */
typedef void (*gemm_function)(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                              const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
enum { ROW_MAJOR = 101, PLAIN = 111, TURNED = 112 };
enum { SUMMED = 1024 }; /* numbers that a sum takes at a time */

extern int omp_get_thread_num(void);

/* e^x; 0 below -87, where results and their products would be subnormal, and e^87 above 87; NaN of NaN.
 * x = n ln 2 + r with |r| <= ln 2 / 2; e^r by Cephes' polynomial (Moshier, expf), within 2 units in the last place.
 * n is read from the bits of the rounded sum, in unsigned numbers: converting a NaN to an integer is undefined. */
INLINE float exponential(float x)
{
    const float rounding = 12582912.0f; /* 1.5 * 2^23, 0x4b400000: adding it rounds to an integer */
    union {
        uint32_t bits;
        float value;
    } sum, power;
    float bounded = x > 87.0f ? 87.0f : (x < -87.0f ? -87.0f : x), n, r, p = 1.9875691500e-4f;
    sum.value = bounded * 1.44269504088896341f + rounding;
    n = sum.value - rounding;
    r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    power.bits = (sum.bits - 0x4b400000u + 127u) << 23;
    return x < -87.0f ? 0.0f : p * power.value;
}

/* 0 below -87, so that a huge number times it is none of its own size */
INLINE float sigmoid(float x) { return x < -87.0f ? 0.0f : 1.0f / (1.0f + exponential(-x)); }

INLINE float dot(const float *a, const float *b, long size)
{
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < size; i++) sum += a[i] * b[i];
    return sum;
}

INLINE float largest(const float *values, long size)
{
    float most = values[0];
#pragma omp simd reduction(max : most)
    for (long i = 0; i < size; i++) most = values[i] > most ? values[i] : most;
    return most;
}

/* values -> e^(values - shift); returns their sum, part by part: in one, a vocabulary's small terms would be lost */
INLINE float exponentials(float *values, long size, float shift)
{
    float total = 0.0f;
    for (long start = 0; start < size; start += SUMMED) {
        float sum = 0.0f;
        long end = start + SUMMED < size ? start + SUMMED : size;
#pragma omp simd reduction(+ : sum)
        for (long i = start; i < end; i++) {
            values[i] = exponential(values[i] - shift);
            sum += values[i];
        }
        total += sum;
    }
    return total;
}

INLINE void softmax_row(float *scores, const float *bias, long size)
{
    float scale;
    if (bias)
        for (long i = 0; i < size; i++) scores[i] += bias[i];
    scale = 1.0f / exponentials(scores, size, largest(scores, size));
    for (long i = 0; i < size; i++) scores[i] *= scale;
}

/* One head turned by angles whose halves are equal; sign -1 turns back. */
INLINE void turn(const float *x, const float *cosines, const float *sines, float sign, long width, float *turned)
{
    long half = width / 2;
#pragma omp simd
    for (long i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        turned[i] = a * cosines[i] - sign * b * sines[i];
        turned[half + i] = b * cosines[half + i] + sign * a * sines[half + i];
    }
}

#endif
