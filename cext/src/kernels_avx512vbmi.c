/* kernels_avx512vbmi.c - AVX-512 VBMI beside the extensions of kernels_avx512.c; compiled with these flags
 * (CMakeLists.txt), called only where CPU and system have them.
 *
 *   vpermb  64 table look-ups, as vpshufb's, that take 6 bits of an index instead of 4 and a zero
 */
#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include "lut16.h"
#include "scalar.h"

#define AHEAD 8192
#define vb_table(p) ((vb)_mm512_zextsi128_si512(_mm_loadu_si128((const __m128i *)(p))))
#define vb_low(v) ((v) & 15)
#define vb_high(v) ((vb)_mm512_gf2p8affine_epi64_epi8((__m512i)(v), _mm512_set1_epi64(0x1020408000000000), 0))
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
