/* Passes over float32 arrays that paddle's CPU operators make one by one and mostly on one thread, each in one piece.
 *
 * setup.py builds this file once per kind of processor; cpu.py documents shapes, cpu_library.py loads
 * the library that fits.
 * Every function has its plain form in paddle operators, which tests hold it against.  All arrays are contiguous.
 * Threads are those of the OpenMP runtime that paddle itself uses: the library is linked with none of its own.
 *
 * Numbers: infinities and NaN come out where the plain forms have them, so no -ffast-math; sums are reassociated where
 * a pragma allows it.  Every row is computed by one thread, so that its last bit does not depend on how many there are.
 */
#include <stdint.h>

#define KERNELS_VERSION 1 /* counts changes of any function's arguments; cpu_library.py names the same */
#define INLINE static inline __attribute__((always_inline))

/* cblas_sgemm of the library that paddle's own products use */
typedef void (*gemm_function)(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                              const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
enum { ROW_MAJOR = 101, PLAIN = 111, TURNED = 112 };
enum { LINE = 16, AHEAD = 32 }; /* floats of a cache line; rows that are asked for ahead of their use */
enum { SUMMED = 1024 }; /* numbers that a sum takes at a time */

/* Numbers that are computed with at once; rows of a weight that a product reads at a time, and columns of a piece */
enum { WIDTH = 16, STEP = 8, PIECE = 2048 };
typedef float wide __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

extern int omp_get_thread_num(void);

int kernels_version(void) { return KERNELS_VERSION; }

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

void rotate(long threads, long rows, long heads, long width, const float *states, const float *cosines,
            const float *sines, float sign, float *outputs)
{
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++)
        for (long head = row * heads; head < (row + 1) * heads; head++)
            turn(states + head * width, cosines + row * width, sines + row * width, sign, width,
                 outputs + head * width);
}

/* Sizes of an attention.  block: queries computed at a time; causal: 1 where every key after its query is hidden;
 * bias_step: floats from a batch row's bias to the next, 0 where there is one for all. */
struct attention_sizes {
    long batch, queries, keys, heads, key_heads, width, block, causal, bias_step;
};

/* What one block of a head's queries works on: offsets of query and key arrays, and of the bias. */
struct block {
    long rows, end, query, key, bias;
};

INLINE struct block find_block(const struct attention_sizes *n, long row, long head, long start)
{
    struct block found;
    found.rows = n->queries - start < n->block ? n->queries - start : n->block;
    found.end = n->causal ? n->keys - n->queries + start + found.rows : n->keys;
    found.query = (row * n->queries + start) * n->heads * n->width + head * n->width;
    found.key = row * n->keys * n->key_heads * n->width + head / (n->heads / n->key_heads) * n->width;
    found.bias = row * n->bias_step + start * n->keys;
    return found;
}

/* softmax weights [rows, end] of a block */
INLINE void weigh(gemm_function gemm, const struct attention_sizes *n, const struct block *b, const float *queries,
                  const float *keys, const float *bias, float scale, float *weights)
{
    gemm(ROW_MAJOR, PLAIN, TURNED, b->rows, b->end, n->width, scale, queries + b->query, n->heads * n->width,
         keys + b->key, n->key_heads * n->width, 0.0f, weights, b->end);
    for (long row = 0; row < b->rows; row++)
        softmax_row(weights + row * b->end, bias ? bias + b->bias + row * n->keys : 0, b->end);
}

/* scratch: [threads, block * keys] */
void attention(long threads, gemm_function gemm, const struct attention_sizes *n, const float *queries,
               const float *keys, const float *values, const float *bias, float scale, float *outputs, float *scratch)
{
    long query_step = n->heads * n->width, key_step = n->key_heads * n->width;
#pragma omp parallel for num_threads(threads)
    for (long task = 0; task < n->batch * n->heads; task++) {
        float *weights = scratch + omp_get_thread_num() * n->block * n->keys;
        for (long start = 0; start < n->queries; start += n->block) {
            struct block b = find_block(n, task / n->heads, task % n->heads, start);
            weigh(gemm, n, &b, queries, keys, bias, scale, weights);
            gemm(ROW_MAJOR, PLAIN, PLAIN, b.rows, n->width, b.end, 1.0f, weights, b.end, values + b.key, key_step,
                 0.0f, outputs + b.query, query_step);
        }
    }
}

/* scratch: [threads, 2 * block * keys].  Gradients of keys and values are zeros before.  A task is a key head with all
 * query heads that read it, whose gradients add up. */
void attention_backward(long threads, gemm_function gemm, const struct attention_sizes *n, const float *grads,
                        const float *queries, const float *keys, const float *values, const float *bias, float scale,
                        float *query_grads, float *key_grads, float *value_grads, float *scratch)
{
    long groups = n->heads / n->key_heads, query_step = n->heads * n->width, key_step = n->key_heads * n->width;
#pragma omp parallel for num_threads(threads)
    for (long task = 0; task < n->batch * n->key_heads; task++) {
        float *weights = scratch + omp_get_thread_num() * 2 * n->block * n->keys;
        float *slopes = weights + n->block * n->keys;
        for (long part = 0; part < groups; part++)
            for (long start = 0; start < n->queries; start += n->block) {
                struct block b =
                    find_block(n, task / n->key_heads, task % n->key_heads * groups + part, start);
                const float *g = grads + b.query;
                weigh(gemm, n, &b, queries, keys, bias, scale, weights);
                gemm(ROW_MAJOR, TURNED, PLAIN, b.end, n->width, b.rows, 1.0f, weights, b.end, g, query_step, 1.0f,
                     value_grads + b.key, key_step);
                gemm(ROW_MAJOR, PLAIN, TURNED, b.rows, b.end, n->width, 1.0f, g, query_step, values + b.key,
                     key_step, 0.0f, slopes, b.end);
                for (long row = 0; row < b.rows; row++) {
                    float *slope = slopes + row * b.end, *weight = weights + row * b.end;
                    float mean = dot(slope, weight, b.end);
#pragma omp simd
                    for (long i = 0; i < b.end; i++) slope[i] = (slope[i] - mean) * weight[i];
                }
                gemm(ROW_MAJOR, PLAIN, PLAIN, b.rows, n->width, b.end, scale, slopes, b.end, keys + b.key, key_step,
                     0.0f, query_grads + b.query, query_step);
                gemm(ROW_MAJOR, TURNED, PLAIN, b.end, n->width, b.rows, scale, slopes, b.end, queries + b.query,
                     query_step, 1.0f, key_grads + b.key, key_step);
            }
    }
}

/* scale q k for each of `count` keys; four at a time, whose sums are added side by side */
INLINE void score(const float *restrict q, const float *restrict k, float scale, long count, long width,
                  float *restrict scores)
{
    long j = 0;
    for (; j + 4 <= count; j += 4, k += 4 * width) {
        for (long i = 0; i < 4 * width; i += LINE) __builtin_prefetch(k + AHEAD * width + i);
        float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
        for (long i = 0; i < width; i++) {
            a += q[i] * k[i];
            b += q[i] * k[width + i];
            c += q[i] * k[2 * width + i];
            d += q[i] * k[3 * width + i];
        }
        scores[j] = scale * a, scores[j + 1] = scale * b, scores[j + 2] = scale * c, scores[j + 3] = scale * d;
    }
    for (; j < count; j++, k += width) scores[j] = scale * dot(q, k, width);
}

/* sum of factors times rows [count, width]; four at a time, so that it is stored less often */
INLINE void add_rows(const float *restrict factors, const float *restrict rows, long count, long width,
                     float *restrict sum)
{
    long j = 0;
    for (long i = 0; i < width; i++) sum[i] = 0.0f;
    for (; j + 4 <= count; j += 4, rows += 4 * width) {
        for (long i = 0; i < 4 * width; i += LINE) __builtin_prefetch(rows + AHEAD * width + i);
        float a = factors[j], b = factors[j + 1], c = factors[j + 2], d = factors[j + 3];
#pragma omp simd
        for (long i = 0; i < width; i++)
            sum[i] += a * rows[i] + b * rows[width + i] + c * rows[2 * width + i] + d * rows[3 * width + i];
    }
    for (; j < count; j++, rows += width)
#pragma omp simd
        for (long i = 0; i < width; i++) sum[i] += factors[j] * rows[i];
}

/* Sizes of tokens after a cache.  room: positions of the buffers; held: written before; window: positions that a
 * token sees, its own included. */
struct cached_sizes {
    long batch, tokens, heads, key_heads, width, room, held, window;
};

/* New tokens' keys are turned and, with their values, written after the `held` positions of the buffers [B, K, R, E];
 * each query is turned and replaced by what it attends to.  hidden: leading positions that a row does not see.
 * scratch: [threads, R + E]. */
void attend_cached(long threads, const struct cached_sizes *n, float *queries, const float *keys, const float *values,
                   const float *cosines, const float *sines, float *key_buffer, float *value_buffer,
                   const int64_t *hidden, float scale, float *scratch)
{
    long groups = n->heads / n->key_heads, width = n->width;
#pragma omp parallel for num_threads(threads)
    for (long task = 0; task < n->batch * n->key_heads; task++) {
        long row = task / n->key_heads, key_head = task % n->key_heads;
        float *k = key_buffer + task * n->room * width, *v = value_buffer + task * n->room * width;
        float *weights = scratch + omp_get_thread_num() * (n->room + width), *turned = weights + n->room;
        for (long token = 0; token < n->tokens; token++) {
            long position = row * n->tokens + token, place = (n->held + token) * width;
            long source = (position * n->key_heads + key_head) * width;
            turn(keys + source, cosines + position * width, sines + position * width, 1.0f, width, k + place);
            for (long i = 0; i < width; i++) v[place + i] = values[source + i];
        }
        for (long token = 0; token < n->tokens; token++) {
            long position = row * n->tokens + token, end = n->held + token + 1;
            long start = end - n->window > hidden[row] ? end - n->window : hidden[row];
            for (long head = key_head * groups; head < (key_head + 1) * groups; head++) {
                float *query = queries + (position * n->heads + head) * width;
                turn(query, cosines + position * width, sines + position * width, 1.0f, width, turned);
                score(turned, k + start * width, scale, end - start, width, weights);
                softmax_row(weights, 0, end - start);
                add_rows(weights, v + start * width, end - start, width, query);
            }
        }
    }
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
