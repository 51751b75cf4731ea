/* lut16_x86.h - the sign products of lut16.h for vectors of LB bytes, half a panel (AVX2) or a whole one (AVX-512).
 *
 * Of 13.5 vector instructions that look up and add LB rows x 8 columns, 4 are look-ups. Most of the others add bytes,
 * and these are saved by an average: of the look-ups x of 8 groups, "all" adds up every x, as pairs of bytes mod 2^16,
 * and "near" their average, as pairs of bytes that do not overflow. An average of averages that round up is in
 * [mean, mean + 1.5], so after n averages a sum is in [8 * near - 12 * n, 8 * near]: as n <= 18, its low byte, which
 * "all" has, makes it exact. That takes 2.25 instructions an x, where all += x, odd += x >> 8 takes 3.
 *
 * Measured on one core of a Cascade Lake whose other hyperthread was busy, 2048 columns, in signs per cycle: 61 with
 * AVX-512 where 3 instructions gave 50. By count, if nothing but the ports bound them: 76 (AVX-512) and 57 (AVX2).
 *
 * From memory. A panel of 4096 columns passes over 32 KB of tables, all that the L1 cache holds, so that tables miss it
 * as weights do, and both want its few buffers for misses, some 24 on a Zen 4. Weights that are prefetched from memory
 * into the L1 cache hold these for as long as that takes: a loop that only reads gets 14 GB/s so, where the core can
 * read 30. And with that many tables from the L2 cache, what the CPU prefetches by itself goes wrong. So weights are
 * prefetched far ahead into the L2 cache, and just ahead from there into the L1 cache. With one plane, which takes less
 * time than the memory, many of the former are dropped: asking again is better there. Both halves of a panel take turns
 * every 8 groups, so that weights are asked for steadily. One core of a Zen 4, 4096 x 4096, large pages, Gs/s from the
 * L3 cache / from memory (30 GB/s are 240 Gs/s):
 *                                       AVX2        AVX-512     VBMI
 *   two planes: into L1, 8 KB           159 / 86    186 / 112   243 / 112  (AVX2 had a half of 128 groups at a time)
 *               nothing                 187 / 84    187 / 99    241 / 102
 *               into L2, 16 KB          188 / 178   188 / 184   249 / 160
 *               and L1, 2 KB            188 / 176   192 / 190   248 / 230
 *               instead, L2, 6 KB       182 / 174   192 / 189   234 / 209
 *   one plane:  into L1, 8 KB           231 / 110   263 / 152   311 / 149
 *               nothing                 240 / 114   265 / 138   320 / 136
 *               L2, 16 KB, and L1, 2 KB 240 / 215   266 / 218   323 / 186
 *               instead, L2, 6 KB       239 / 214   260 / 228   317 / 229
 * Distances of 12 to 32 KB and of 1 to 4 KB are as good within 5 %, 4 KB for the first are too few; every other line is
 * half as fast. From small pages, where memory is fragmented, 110 to 130, and the core itself reads 14 to 20 GB/s.
 * Not measured on Intel, whose cores have 12 to 16 such buffers, too, and load twice a cycle or more: of 64 rows x 8
 * columns, 5 loads and 2 prefetches are 3.5 of 6.75 cycles with AVX-512, 10 and 2 are 6 of 9 with AVX2.
 *
 * The including file defines, for vectors vb of LB bytes, vb_low(v) and vb_high(v), the nibbles of its bytes,
 * vb_table(p), the 16 bytes at p as vb_look_up(table, nibbles) wants them, vb_avg(a, b) = (a + b + 1) >> 1, and, after
 * this, flush. */
#ifndef DBF_LUT16_X86_H
#define DBF_LUT16_X86_H

#define PARTS (DBF_PANEL / LB)
#define INLINE static inline __attribute__((always_inline))

/* bytes that weights are prefetched ahead, see above: into the L2 cache, then into the L1 cache, or again */
#define FAR 16384
#define NEAR 2048
#define AGAIN 6144

/* Compilers would load the tables of 8 groups once for both parts, and have no registers for them. */
#if LB < 64
#define NO_REUSE __asm__ volatile("" ::: "memory")
#else
#define NO_REUSE (void)0
#endif

typedef uint8_t vb __attribute__((vector_size(LB)));
typedef uint8_t vb_memory __attribute__((vector_size(LB), aligned(1), may_alias));
typedef uint16_t vw __attribute__((vector_size(LB))); /* the same as pairs */

/* sums of even and of odd bytes */
typedef struct sums {
    vw even, odd;
} sums_t;

/* isum[LB rows] += 2 * low + 256 * high */
static inline void flush(int32_t *isum, sums_t low, sums_t high);

/* what the two planes of a group give */
typedef struct planes {
    vb low, high;
} planes_t;

static inline vb vb_load(const uint8_t *p)
{
    vb v = (vb)*(const vb_memory *)p;
    __asm__("" : "+x"(v)); /* loads are scarce, too: one, and no operands in memory */
    return v;
}

/* sums of many bytes, see above */
typedef struct tally {
    vw all, near, near_odd;
} tally_t;

static inline void add_near(tally_t *t, vb average)
{
    t->near = t->near + (vw)average;
    t->near_odd = t->near_odd + ((vw)average >> 8);
}

static inline sums_t exact(tally_t t)
{
    vw even = (t.near - (t.near_odd << 8)) << 3, odd = t.near_odd << 3;
    even = even - ((even - t.all) & 255);
    odd = odd - ((odd - ((t.all - even) >> 8)) & 255);
    return (sums_t){ even, odd };
}

/* average with n - 1 times as many zeros: n = 2, 4, 8 */
static inline vb among(vb average, int n)
{
    const vb zero = { 0 };
    for (; n > 1; n /= 2) average = vb_avg(average, zero);
    return average;
}

/* n groups ahead of those at w, with two planes and with one; inlined, as gcc 12 drops calls of functions that do
 * nothing but this */
INLINE void prefetch(const uint8_t *w, int n)
{
    for (int i = 0; i < n; i++) {
        _mm_prefetch((const char *)w + FAR + i * DBF_PANEL, _MM_HINT_T1);
        _mm_prefetch((const char *)w + NEAR + i * DBF_PANEL, _MM_HINT_T0);
    }
}

INLINE void prefetch8(const uint8_t *w, int n)
{
    for (int i = 0; i < n; i++) {
        _mm_prefetch((const char *)w + FAR + i * DBF_PANEL, _MM_HINT_T1);
        _mm_prefetch((const char *)w + AGAIN + i * DBF_PANEL, _MM_HINT_T1);
    }
}

/* ---- two planes ------------------------------------------------------------------------------------------- */

static inline planes_t look_up(const uint8_t *w, const uint8_t *t)
{
    vb v = vb_load(w), a = vb_low(v), b = vb_high(v);
    return (planes_t){ vb_look_up(vb_table(t), a) + vb_look_up(vb_table(t + 32), b),
                       vb_look_up(vb_table(t + 64), a) + vb_look_up(vb_table(t + 96), b) };
}

/* of 1, 2, 4 and 8 groups, the first of which is the first of a pair: averages; low and high += every look-up */
static inline planes_t look_up_1(const uint8_t *w, const uint8_t *t, tally_t *low, tally_t *high)
{
    planes_t x = look_up(w, t);
    low->all = low->all + (vw)x.low;
    high->all = high->all + (vw)x.high;
    return x;
}

static inline planes_t look_up_2(const uint8_t *w, const uint8_t *t, tally_t *low, tally_t *high)
{
    planes_t x = look_up_1(w, t, low, high), y = look_up_1(w + DBF_PANEL, t + 16, low, high);
    return (planes_t){ vb_avg(x.low, y.low), vb_avg(x.high, y.high) };
}

static inline planes_t look_up_4(const uint8_t *w, const uint8_t *t, tally_t *low, tally_t *high)
{
    planes_t x = look_up_2(w, t, low, high), y = look_up_2(w + 2 * DBF_PANEL, t + 2 * LUT16_GROUP, low, high);
    return (planes_t){ vb_avg(x.low, y.low), vb_avg(x.high, y.high) };
}

static inline planes_t look_up_8(const uint8_t *w, const uint8_t *t, tally_t *low, tally_t *high)
{
    planes_t x = look_up_4(w, t, low, high), y = look_up_4(w + 4 * DBF_PANEL, t + 4 * LUT16_GROUP, low, high);
    return (planes_t){ vb_avg(x.low, y.low), vb_avg(x.high, y.high) };
}

/* of n groups, n = 1, 2, 4, 8 */
static inline void add_n(const uint8_t *w, const uint8_t *t, tally_t *low, tally_t *high, int n)
{
    planes_t x = n == 8   ? look_up_8(w, t, low, high)
                 : n == 4 ? look_up_4(w, t, low, high)
                 : n == 2 ? look_up_2(w, t, low, high)
                          : look_up_1(w, t, low, high);
    add_near(low, among(x.low, 8 / n));
    add_near(high, among(x.high, 8 / n));
}

/* n groups of the panel's parts, n = 1, 2, 4, 8 */
static inline void add_parts(const uint8_t *w, const uint8_t *t, tally_t *low, tally_t *high, int n)
{
    for (int part = 0; part < PARTS; part++) {
        NO_REUSE;
        add_n(w + part * LB, t, &low[part], &high[part], n);
    }
}

/* isum[DBF_PANEL] += what n <= LUT16_GROUPS groups give */
static inline void add_groups(int32_t *isum, const uint8_t *w, const uint8_t *t, int n)
{
    tally_t low[PARTS] = { 0 }, high[PARTS] = { 0 };
    for (int g = 0; g < n / 8; g++, w += 8 * DBF_PANEL, t += 8 * LUT16_GROUP) {
        prefetch(w, 8);
        add_parts(w, t, low, high, 8);
    }
    if (n & 4) {
        add_parts(w, t, low, high, 4);
        w += 4 * DBF_PANEL, t += 4 * LUT16_GROUP;
    }
    if (n & 2) {
        add_parts(w, t, low, high, 2);
        w += 2 * DBF_PANEL, t += 2 * LUT16_GROUP;
    }
    if (n & 1) add_parts(w, t, low, high, 1);
    for (int part = 0; part < PARTS; part++) flush(isum + part * LB, exact(low[part]), exact(high[part]));
}

/* isum[DBF_PANEL] += what n <= 16 extras from `first` on give */
static void add_extras(int32_t *isum, const uint8_t *w, const lut16_t *t, int first, int n)
{
    tally_t low[PARTS] = { 0 }, high[PARTS] = { 0 };
    for (int i = first; i < first + n; i++)
        add_parts(w + lut16_at(t, i) * DBF_PANEL, t->extra + (size_t)i * t->pair, low, high, 1);
    for (int part = 0; part < PARTS; part++) flush(isum + part * LB, exact(low[part]), exact(high[part]));
}

static void sign_gemv_x86(int32_t *isum, const uint8_t *w, const void *table, int rows, int cols)
{
    lut16_t t = lut16_open(table, cols, LUT16_GROUP);
    int groups = (cols + 7) / 8;
    (void)rows;
    for (int r = 0; r < DBF_PANEL; r++) isum[r] = -t.l1;
    for (int g = 0; g < groups; g += LUT16_GROUPS)
        add_groups(isum, w + (size_t)g * DBF_PANEL, t.pairs + (size_t)g * LUT16_GROUP,
                   groups - g < LUT16_GROUPS ? groups - g : LUT16_GROUPS);
    for (int i = 0; i < t.extras; i += 16) add_extras(isum, w, &t, i, t.extras - i < 16 ? t.extras - i : 16);
}

/* ---- one plane: two look-ups a group ---------------------------------------------------------------------- */

#define LUT8_GROUPS (LUT16_GROUPS / 2)

/* of 1, 2 and 4 groups: averages; all += every look-up */
static inline vb look_up8_1(const uint8_t *w, const uint8_t *t, tally_t *sum)
{
    vb v = vb_load(w), a = vb_low(v), b = vb_high(v);
    a = vb_look_up(vb_table(t), a);
    b = vb_look_up(vb_table(t + 32), b);
    sum->all = sum->all + (vw)a + (vw)b;
    return vb_avg(a, b);
}

static inline vb look_up8_2(const uint8_t *w, const uint8_t *t, tally_t *sum)
{
    vb x = look_up8_1(w, t, sum), y = look_up8_1(w + DBF_PANEL, t + 16, sum);
    return vb_avg(x, y);
}

static inline vb look_up8_4(const uint8_t *w, const uint8_t *t, tally_t *sum)
{
    vb x = look_up8_2(w, t, sum), y = look_up8_2(w + 2 * DBF_PANEL, t + 2 * LUT8_GROUP, sum);
    return vb_avg(x, y);
}

/* of n groups, n = 1, 2, 4 */
static inline void add8_n(const uint8_t *w, const uint8_t *t, tally_t *sum, int n)
{
    vb x = n == 4 ? look_up8_4(w, t, sum) : n == 2 ? look_up8_2(w, t, sum) : look_up8_1(w, t, sum);
    add_near(sum, among(x, 4 / n));
}

/* n groups of the panel's parts, n = 1, 2, 4 */
static inline void add8_parts(const uint8_t *w, const uint8_t *t, tally_t *sum, int n)
{
    for (int part = 0; part < PARTS; part++) {
        NO_REUSE;
        add8_n(w + part * LB, t, &sum[part], n);
    }
}

static inline void flush8(int32_t *isum, const tally_t *sum)
{
    const vw zero = { 0 };
    for (int part = 0; part < PARTS; part++) flush(isum + part * LB, exact(sum[part]), (sums_t){ zero, zero });
}

/* isum[DBF_PANEL] += what n <= LUT8_GROUPS groups give */
static inline void add8_groups(int32_t *isum, const uint8_t *w, const uint8_t *t, int n)
{
    tally_t sum[PARTS] = { 0 };
    for (int g = 0; g < n / 4; g++, w += 4 * DBF_PANEL, t += 4 * LUT8_GROUP) {
        prefetch8(w, 4);
        add8_parts(w, t, sum, 4);
    }
    if (n & 2) {
        add8_parts(w, t, sum, 2);
        w += 2 * DBF_PANEL, t += 2 * LUT8_GROUP;
    }
    if (n & 1) add8_parts(w, t, sum, 1);
    flush8(isum, sum);
}

static void add8_extras(int32_t *isum, const uint8_t *w, const lut16_t *t, int first, int n)
{
    tally_t sum[PARTS] = { 0 };
    for (int i = first; i < first + n; i++)
        add8_parts(w + lut16_at(t, i) * DBF_PANEL, t->extra + (size_t)i * t->pair, sum, 1);
    flush8(isum, sum);
}

static void sign_gemv8_x86(int32_t *isum, const uint8_t *w, const void *table, int rows, int cols)
{
    lut16_t t = lut16_open(table, cols, LUT8_GROUP);
    int groups = (cols + 7) / 8;
    (void)rows;
    for (int r = 0; r < DBF_PANEL; r++) isum[r] = -t.l1;
    for (int g = 0; g < groups; g += LUT8_GROUPS)
        add8_groups(isum, w + (size_t)g * DBF_PANEL, t.pairs + (size_t)g * LUT8_GROUP,
                    groups - g < LUT8_GROUPS ? groups - g : LUT8_GROUPS);
    for (int i = 0; i < t.extras; i += 16) add8_extras(isum, w, &t, i, t.extras - i < 16 ? t.extras - i : 16);
}

#endif
