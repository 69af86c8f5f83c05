/* Attention in float32: whole rows forward and backward, and new tokens over a cache; by the rules of cpu_kernels.c.
 *
 * Scores of all keys never exist at once: a block of queries is computed at a time, whose scores stay in the cache.
 */
#include "kernels.h"

enum { LINE = 16, AHEAD = 32 }; /* floats of a cache line; rows that are asked for ahead of their use */

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
