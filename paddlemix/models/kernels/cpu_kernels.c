/* Passes over float32 arrays that paddle's CPU operators make one by one and mostly on one thread, each in one piece.
 * Attention is in attention_kernels.c.
 *
 * setup.py builds these files once per kind of processor; cpu.py documents shapes, cpu_library.py loads
 * the library that fits.
 * Every function has its plain form in paddle operators, which tests hold it against.  All arrays are contiguous.
 * Threads are those of the OpenMP runtime that paddle itself uses: the library is linked with none of its own.
 *
 * Numbers: infinities and NaN come out where the plain forms have them, so no -ffast-math; sums are reassociated where
 * a pragma allows it.  Every row is computed by one thread, so that its last bit does not depend on how many there are.
 */
#include "kernels.h"

#define KERNELS_VERSION 2 /* counts changes of any function's arguments; cpu_library.py names the same */

/* Numbers that are computed with at once; rows of a weight that a product reads at a time, and columns of a piece */
enum { WIDTH = 16, STEP = 8, PIECE = 2048 };
typedef float wide __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

int kernels_version(void) { return KERNELS_VERSION; }

/* scales: [rows], for the backward pass; may be NULL */
void rms_norm(long threads, long rows, long width, const float *inputs, const float *weight, float epsilon,
              float *outputs, float *scales)
{
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const float *x = inputs + row * width;
        float *y = outputs + row * width;
        float scale = 1.0f / __builtin_sqrtf(dot(x, x, width) / (float)width + epsilon);
#pragma omp simd
        for (long i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
        if (scales) scales[row] = scale;
    }
}

/* weight_grads: zeros [threads, width], a part from each thread; may be NULL */
void rms_norm_backward(long threads, long rows, long width, const float *grads, const float *inputs,
                       const float *weight, const float *scales, float *input_grads, float *weight_grads)
{
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const float *g = grads + row * width, *x = inputs + row * width;
        float *d = input_grads + row * width, scale = scales[row], mean = 0.0f;
#pragma omp simd reduction(+ : mean)
        for (long i = 0; i < width; i++) mean += g[i] * weight[i] * x[i];
        mean *= scale * scale / (float)width;
#pragma omp simd
        for (long i = 0; i < width; i++) d[i] = (g[i] * weight[i] - x[i] * mean) * scale;
        if (weight_grads) {
            float *sums = weight_grads + omp_get_thread_num() * width;
#pragma omp simd
            for (long i = 0; i < width; i++) sums[i] += g[i] * x[i] * scale;
        }
    }
}

/* values + bias, in place */
void add_bias(long threads, long rows, long width, float *values, const float *bias)
{
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++)
#pragma omp simd
        for (long i = 0; i < width; i++) values[row * width + i] += bias[i];
}

/* x sigmoid(1.702 x) */
void quick_gelu(long threads, long count, const float *inputs, float *outputs)
{
#pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < count; i++) outputs[i] = inputs[i] * sigmoid(1.702f * inputs[i]);
}

/* gate sigmoid(gate) up; outputs may be the gate */
void gated(long threads, long count, const float *gate, const float *up, float *outputs)
{
#pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < count; i++) outputs[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

void gated_backward(long threads, long count, const float *grads, const float *gate, const float *up,
                    float *gate_grads, float *up_grads)
{
#pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < count; i++) {
        float part = sigmoid(gate[i]), active = gate[i] * part;
        up_grads[i] = grads[i] * active;
        gate_grads[i] = grads[i] * up[i] * part * (1.0f + (gate[i] - active));
    }
}

void rotate(long threads, long rows, long heads, long width, const float *states, const float *cosines,
            const float *sines, float sign, float *outputs)
{
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++)
        for (long head = row * heads; head < (row + 1) * heads; head++)
            turn(states + head * width, cosines + row * width, sines + row * width, sign, width,
                 outputs + head * width);
}

/* outputs[row, i] += sum over `count` <= STEP of inputs[row, k] weight[k, i], for `blocks` <= 2 times WIDTH columns; both
 * are constants wherever this is used, so that the weights stay in registers */
INLINE void add_block(const int count, const int blocks, long rows, long inner, long columns, const float *inputs,
                      const float *weight, float *outputs)
{
    wide parts[STEP][2];
    for (int k = 0; k < count; k++)
        for (int j = 0; j < blocks; j++) {
            parts[k][j] = *(const wide *)(weight + k * columns + j * WIDTH);
            __builtin_prefetch(weight + (STEP + k) * columns + j * WIDTH);
        }
    for (long row = 0; row < rows; row++, inputs += inner, outputs += columns)
        for (int j = 0; j < blocks; j++) {
            wide sum = parts[0][j] * inputs[0];
            for (int k = 1; k < count; k++) sum += parts[k][j] * inputs[k];
            *(wide *)(outputs + j * WIDTH) += sum;
        }
}

INLINE void add_products(const int count, long rows, long inner, long columns, const float *inputs,
                         const float *weight, float *outputs, long first, long last)
{
    long i = first;
    for (; i + 2 * WIDTH <= last; i += 2 * WIDTH)
        add_block(count, 2, rows, inner, columns, inputs, weight + i, outputs + i);
    for (; i + WIDTH <= last; i += WIDTH)
        add_block(count, 1, rows, inner, columns, inputs, weight + i, outputs + i);
    for (; i < last; i++)
        for (long row = 0; row < rows; row++)
            for (int k = 0; k < count; k++)
                outputs[row * columns + i] += inputs[row * inner + k] * weight[k * columns + i];
}

/* Few rows [rows, inner] times a weight [inner, columns], which is read once and in order: a library's product copies
 * it first. */
void matmul_few(long threads, long rows, long inner, long columns, const float *inputs, const float *weight,
                float *outputs)
{
    long share = (columns + threads * WIDTH - 1) / (threads * WIDTH) * WIDTH, piece = share < PIECE ? share : PIECE;
#pragma omp parallel for num_threads(threads)
    for (long start = 0; start < columns; start += piece) {
        long k = 0, end = start + piece < columns ? start + piece : columns;
        for (long row = 0; row < rows; row++)
            for (long i = start; i < end; i++) outputs[row * columns + i] = 0.0f;
        for (; k + STEP <= inner; k += STEP)
            add_products(STEP, rows, inner, columns, inputs + k, weight + k * columns, outputs, start, end);
        for (; k < inner; k++)
            add_products(1, rows, inner, columns, inputs + k, weight + k * columns, outputs, start, end);
    }
}

/* total [left, right] += a^T b of a [rows, left] and b [rows, right], by the library's product */
void add_outer(long threads, long rows, long left, long right, gemm_function gemm, const float *a, const float *b,
               float *total)
{
    (void)threads; /* the library has its own */
    gemm(ROW_MAJOR, TURNED, PLAIN, left, right, rows, 1.0f, a, left, b, right, 1.0f, total, right);
}

/* whether the first of the largest values is that of `place`, as a greedy choice takes it */
INLINE int64_t is_first(const float *values, long place, float most)
{
    if (!(values[place] >= most)) return 0;
    for (long i = 0; i < place; i++)
        if (values[i] >= most) return 0;
    return 1;
}

/* logits -> their gradients; losses and rights (1 where a greedy choice takes the target) of each row */
void cross_entropy(long threads, long rows, long size, float *logits, const int64_t *targets, float *losses,
                   int64_t *rights)
{
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        float *x = logits + row * size, most = largest(x, size), found = x[targets[row]] - most;
        float sum, scale;
        rights[row] = is_first(x, targets[row], most);
        sum = exponentials(x, size, most), scale = 1.0f / sum;
        losses[row] = __builtin_logf(sum) - found;
#pragma omp simd
        for (long i = 0; i < size; i++) x[i] *= scale;
        x[targets[row]] -= 1.0f;
    }
}
