/* Weights that are held in few bits, made wide again or multiplied as they are; formats are in peft/quantized_weight.py.
 *
 * Built into the same library as cpu_kernels.c; peft/cpu_products.py documents shapes.  Every function has its
 * plain form in paddle operators, which tests hold it against: wide numbers bit for bit, products to rounding.
 */
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* NF4: weights per scale, scales per step of their own */
enum { BLOCK = 64, SCALE_GROUP = 256 };
/* Outputs that are computed at once, and their inputs, whose wide weights stay in the nearest cache; rows for which
 * they are made wide once, and whose inputs stay in the next cache */
enum { GROUP = 4, PIECE = 512, BATCH = 16 };
enum { LINE = 64 }; /* bytes of a cache line */

/* Numbers that are computed with at once; rows at once, so that all sums are held in registers */
#if defined(__AVX512F__)
enum { WIDTH = 16, ROWS = 4 };
#elif defined(__AVX2__)
enum { WIDTH = 8, ROWS = 2 };
#else
enum { WIDTH = 4, ROWS = 2 };
#endif
typedef float wide __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

/* A weight's arrays.  bytes: of an output's codes.  scales: of outputs (int8), or steps of the scales' codes (nf4).
 * levels: of nf4, else NULL.  A part of an nf4 weight has its own codes and scale codes, and the steps of the whole:
 * first_block and row_blocks are the place of its first block in the whole, and the whole's blocks in an output. */
struct weight {
    const uint8_t *codes;
    long bytes;
    const float *scales;
    const int8_t *scale_codes;
    float offset;
    const float *levels;
    long first_block, row_blocks;
};

/* What the codes of a block are looked up in, and the 64 weights of its 32 bytes.  A lane reads four bytes, shifted so
 * that its own code comes last: the first weight of a byte is in the upper bits. */
#if defined(__AVX512F__)
struct table {
    __m512 levels;
};

INLINE void fill_table(struct table *table, const float *levels) { table->levels = _mm512_loadu_ps(levels); }

INLINE void widen_block(const struct table *table, const uint8_t *codes, float scale, float *wides)
{
    const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    const __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)codes));
    const __m512 levels = _mm512_mul_ps(table->levels, _mm512_set1_ps(scale));
    __m512i word = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    for (int i = 0; i < BLOCK; i += 16, word = _mm512_add_epi32(word, _mm512_set1_epi32(2))) {
        __m512i places = _mm512_srlv_epi32(_mm512_permutexvar_epi32(word, words), shifts);
        _mm512_storeu_ps(wides + i, _mm512_permutexvar_ps(places, levels)); /* the last four bits count */
    }
}
#elif defined(__AVX2__)
struct table {
    __m256 lower, upper;
};

INLINE void fill_table(struct table *table, const float *levels)
{
    table->lower = _mm256_loadu_ps(levels), table->upper = _mm256_loadu_ps(levels + 8);
}

INLINE void widen_block(const struct table *table, const uint8_t *codes, float scale, float *wides)
{
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    const __m256 lower = _mm256_mul_ps(table->lower, _mm256_set1_ps(scale));
    const __m256 upper = _mm256_mul_ps(table->upper, _mm256_set1_ps(scale));
    for (int i = 0; i < BLOCK; i += 8) {
        int32_t word;
        __builtin_memcpy(&word, codes + i / 2, sizeof word);
        __m256i places = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
        __m256 if_lower = _mm256_permutevar8x32_ps(lower, places); /* the last three bits count */
        __m256 if_upper = _mm256_permutevar8x32_ps(upper, places);
        __m256 is_upper = _mm256_castsi256_ps(_mm256_slli_epi32(places, 28)); /* the fourth, as a sign */
        _mm256_storeu_ps(wides + i, _mm256_blendv_ps(if_lower, if_upper, is_upper));
    }
}
#else
struct table {
    float pairs[256][2];
};

INLINE void fill_table(struct table *table, const float *levels)
{
    for (int code = 0; code < 256; code++) {
        table->pairs[code][0] = levels[code >> 4];
        table->pairs[code][1] = levels[code & 15];
    }
}

INLINE void widen_block(const struct table *table, const uint8_t *codes, float scale, float *wides)
{
    for (int i = 0; i < BLOCK / 2; i++) __builtin_memcpy(wides + 2 * i, table->pairs[codes[i]], 2 * sizeof *wides);
    for (int i = 0; i < BLOCK; i++) wides[i] *= scale;
}
#endif

/* The scale of an nf4 block, by its place in the whole weight.  Its product is stored, so that it is rounded before the
 * sum as paddle rounds it. */
INLINE float block_scale(const struct weight *w, int8_t code, long place)
{
    volatile float product = (float)code * w->scales[place / SCALE_GROUP];
    return product + w->offset;
}

/* Inputs start .. start + count of an output; start is a multiple of BLOCK.  What follows, up to a whole block, is
 * written too. */
INLINE void widen_nf4(const struct weight *w, const struct table *table, long output, long start, long count,
                      float *wides)
{
    const uint8_t *codes = w->codes + output * w->bytes + start / 2;
    const int8_t *scale_code = w->scale_codes + output * (2 * w->bytes / BLOCK) + start / BLOCK;
    long place = w->first_block + output * w->row_blocks + start / BLOCK;
    for (long i = 0; i < count; i += BLOCK)
        widen_block(table, codes + i / 2, block_scale(w, *scale_code++, place++), wides + i);
}

INLINE void widen_int8(const int8_t *codes, float scale, long count, float *wides)
{
#pragma omp simd
    for (long i = 0; i < count; i++) wides[i] = (float)codes[i] * scale;
}

/* sums += products of some rows with GROUP outputs' weights [GROUP, PIECE]; step: from a row to the next */
INLINE void add_products(const int rows, long step, const float *inputs, const float *weights, long count,
                         wide (*sums)[GROUP])
{
    wide parts[ROWS][GROUP];
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < GROUP; k++) parts[row][k] = sums[row][k];
    for (long i = 0; i < count; i += WIDTH)
        for (int k = 0; k < GROUP; k++) {
            wide weight = *(const wide *)(weights + k * PIECE + i);
            for (int row = 0; row < rows; row++) parts[row][k] += weight * *(const wide *)(inputs + row * step + i);
        }
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < GROUP; k++) sums[row][k] = parts[row][k];
}

/* The same for any number of rows */
INLINE void add_all_products(long rows, long step, const float *inputs, const float *weights, long count,
                             wide (*sums)[GROUP])
{
    long row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        add_products(ROWS, step, inputs + row * step, weights, count, sums + row);
    for (; row < rows; row++) add_products(1, step, inputs + row * step, weights, count, sums + row);
}

INLINE float total(wide parts)
{
    float lanes[WIDTH];
    __builtin_memcpy(lanes, &parts, sizeof lanes);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[half + i];
    return lanes[0];
}

/* The weights of an output's inputs [start, start + count), zeros after them; those of int8 without their scale */
INLINE void widen_piece(const struct weight *w, const struct table *table, long output, long start, long count,
                        float *wides)
{
    const uint8_t *codes = w->codes + output * w->bytes + (w->levels ? start / 2 : start);
    long size = w->levels ? count / 2 : count;
    for (long i = 0; i < size; i += LINE) __builtin_prefetch(codes + GROUP * w->bytes + i, 0, 2); /* of the next */
    if (w->levels)
        widen_nf4(w, table, output, start, count, wides);
    else
        widen_int8((const int8_t *)codes, 1.0f, count, wides);
    for (long i = count; i % WIDTH; i++) wides[i] = 0.0f;
}

/* inputs [rows, inner] times a weight, for at most BATCH rows: its codes are read once and in order.  A row's numbers
 * do not depend on the others. */
static void multiply_batch(long threads, long rows, long inner, long columns, const float *inputs,
                           const struct weight *w, float *outputs)
{
    long whole = inner / WIDTH * WIDTH;
    float rest[BATCH][WIDTH] = {{0.0f}}; /* of inputs that fill no vector */
    struct table table;
    if (w->levels) fill_table(&table, w->levels);
    for (long row = 0; row < rows; row++)
        for (long i = whole; i < inner; i++) rest[row][i - whole] = inputs[row * inner + i];
#pragma omp parallel for num_threads(threads)
    for (long first = 0; first < columns; first += GROUP) {
        float weights[GROUP * PIECE] __attribute__((aligned(64)));
        wide sums[BATCH][GROUP];
        for (long row = 0; row < rows; row++)
            for (long k = 0; k < GROUP; k++) sums[row][k] = (wide){0.0f};
        for (long start = 0; start < inner; start += PIECE) {
            long count = inner - start < PIECE ? inner - start : PIECE, full = count / WIDTH * WIDTH;
            for (long k = 0; k < GROUP; k++) {
                long output = first + k < columns ? first + k : columns - 1;
                widen_piece(w, &table, output, start, count, weights + k * PIECE);
            }
            add_all_products(rows, inner, inputs + start, weights, full, sums);
            if (full < count) add_all_products(rows, WIDTH, rest[0], weights + full, WIDTH, sums);
        }
        for (long k = 0; k < GROUP && first + k < columns; k++)
            for (long row = 0; row < rows; row++)
                outputs[row * columns + first + k] = total(sums[row][k]) * (w->levels ? 1.0f : w->scales[first + k]);
    }
}

static void multiply(long threads, long rows, long inner, long columns, const float *inputs, const struct weight *w,
                     float *outputs)
{
    for (; rows > 0; rows -= BATCH, inputs += BATCH * inner, outputs += BATCH * columns)
        multiply_batch(threads, rows < BATCH ? rows : BATCH, inner, columns, inputs, w, outputs);
}

void int8_product(long threads, long rows, long inner, long columns, const float *inputs, const int8_t *codes,
                  const float *scales, float *outputs)
{
    struct weight w = {(const uint8_t *)codes, inner, scales, 0, 0.0f, 0, 0, 0};
    multiply(threads, rows, inner, columns, inputs, &w, outputs);
}

INLINE struct weight nf4_weight(long inner, const uint8_t *codes, const int8_t *scale_codes, const float *steps,
                                const float *offset, const float *levels, long first_block, long row_blocks)
{
    long bytes = (inner + BLOCK - 1) / BLOCK * (BLOCK / 2);
    struct weight w = {codes, bytes, steps, scale_codes, *offset, levels, first_block, row_blocks};
    return w;
}

void nf4_product(long threads, long rows, long inner, long columns, const float *inputs, const uint8_t *codes,
                 const int8_t *scale_codes, const float *steps, const float *offset, const float *levels,
                 long first_block, long row_blocks, float *outputs)
{
    struct weight w = nf4_weight(inner, codes, scale_codes, steps, offset, levels, first_block, row_blocks);
    multiply(threads, rows, inner, columns, inputs, &w, outputs);
}

/* Weights [count, inner] of the outputs from `first` on; scales may be NULL */
void int8_widen(long threads, long first, long count, long inner, const int8_t *codes, const float *scales,
                float *outputs)
{
#pragma omp parallel for num_threads(threads)
    for (long k = 0; k < count; k++)
        widen_int8(codes + (first + k) * inner, scales ? scales[first + k] : 1.0f, inner, outputs + k * inner);
}

void nf4_widen(long threads, long first, long count, long inner, const uint8_t *codes, const int8_t *scale_codes,
               const float *steps, const float *offset, const float *levels, long first_block, long row_blocks,
               float *outputs)
{
    struct weight w = nf4_weight(inner, codes, scale_codes, steps, offset, levels, first_block, row_blocks);
    long whole = inner / BLOCK * BLOCK;
    struct table table;
    fill_table(&table, levels);
#pragma omp parallel for num_threads(threads)
    for (long k = 0; k < count; k++) {
        float rest[BLOCK], *row = outputs + k * inner;
        widen_nf4(&w, &table, first + k, 0, whole, row);
        if (whole < inner) {
            widen_nf4(&w, &table, first + k, whole, BLOCK, rest);
            for (long i = whole; i < inner; i++) row[i] = rest[i - whole];
        }
    }
}
