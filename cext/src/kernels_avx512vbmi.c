/* kernels_avx512vbmi.c - AVX-512 VBMI and GFNI beside what kernels_avx512.c needs; compiled with these flags
 * (CMakeLists.txt), called only where CPU and system have them.
 *
 *   vmovdqu (16 bytes)  a table
 *   vpermb              64 table look-ups, all of them in the lowest quarter of a register
 *   vgf2p8affineqb      the upper nibbles: shift and mask in one
 *
 * Layouts, tables and all else are kernels_avx512.c's. There, a table is repeated in the four quarters of a register,
 * and on a Zen 4 vbroadcasti32x4 takes the unit that shuffles, one a cycle, even from memory: with 4 of these, 4 vpshufb
 * and 1.25 shifts, 512 signs take 9.25 cycles there, where by their number 13.5 vector instructions would take 6.75.
 * Here the unit has 4.25 to do, and 12.5 instructions are 6.25 cycles. Measured on one core of a Zen 4 at 3.7 GHz, 2048
 * columns, weights in the caches, in signs per cycle: 70 instead of 53, with one plane 96 instead of 80. From memory:
 * lut16_x86.h.
 *
 * An Intel core broadcasts on a load port, so that only a mask is saved there: 12.5 instructions instead of 13.5, not
 * measured; dispatch.c takes this set by itself on AMD's alone. What else was tried, in signs per cycle of the Zen 4:
 *   44  vpermi2b on 128 entries of 7 columns, the eighth added where its bit is set: 9.5 instructions, but seven loads,
 *       and 256 bytes of table for 8 columns, too many for the L1 cache beyond 1000 columns (61 below)
 *   55  vpermb on a table in all quarters: 11.5 instructions, as the other two bits of an index make no difference,
 *       but the broadcasts are back
 *   57  the same in registers of 256 bits, whose broadcasts are loads
 *   61  vpshufb on 16 rows x 4 groups, whose four tables are one load: at the end, the quarters must be added up
 *   65  as here, with shift and mask; 67 with vgf2p8affineqb, but in gcc 12's order of instructions */
#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include "lut16.h"

#define NIBBLE 0x1020408000000000 /* as a matrix of bits, whose rows come last first: 4-7 of a byte to 0-3 */
#define vb_low(v) ((v) & 15)
#define vb_high(v) ((vb)_mm512_gf2p8affine_epi64_epi8((__m512i)(v), _mm512_set1_epi64(NIBBLE), 0))
#define vb_table(p) ((vb)_mm512_zextsi128_si512(_mm_loadu_si128((const __m128i *)(p))))
#define vb_look_up(table, v) ((vb)_mm512_permutexvar_epi8((__m512i)(v), (__m512i)(table)))

#include "lut16_avx512.h"

void kernels_avx512vbmi(kernels_t *k)
{
    kernels_avx512(k);
    k->name = "avx512vbmi";
    k->sign_gemv = sign_gemv_x86;
    k->sign_gemv8 = sign_gemv8_x86;
}

#else
typedef int dbf_no_avx512vbmi; /* a translation unit must not be empty */
#endif
