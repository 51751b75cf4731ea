/* demotion.c - an instruction set with one wrong kernel must not be used.
 *
 * kernels_avx2 and kernels_neon are replaced, at link time, by the scalar kernels with one result off by one bit: each
 * kernel in a process of its own, as sets are tested once. Exit status 0 and "ok" if all were noticed. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../dbf.h"
#include "../src/kernels.h"

static void flip(float *x)
{
    uint32_t bits;
    memcpy(&bits, x, sizeof bits);
    bits ^= 1;
    memcpy(x, &bits, sizeof bits);
}

#define WRONG(kernel, params, args, spoil) \
    static void wrong_##kernel params      \
    {                                      \
        kernels_ref.kernel args;           \
        spoil;                             \
    }

static float wrong_quantize(int16_t *q, const float *x, int n)
{
    float scale = kernels_ref.quantize(q, x, n);
    q[n - 1] ^= 1;
    return scale;
}

static float wrong_softmax(float *x, int n)
{
    float sum = kernels_ref.softmax(x, n);
    flip(&sum);
    return sum;
}

static float wrong_quantize_scaled(int16_t *q, float *z, const float *x, const uint16_t *s, int n, int qmax)
{
    float scale = kernels_ref.quantize_scaled(q, z, x, s, n, qmax);
    q[n - 1] ^= 1;
    return scale;
}

WRONG(descale, (float *y, const int32_t *isum, float scale, const uint16_t *s, const float *bias, int n),
      (y, isum, scale, s, bias, n), flip(&y[n - 1]))
WRONG(sign_gemv, (int32_t *isum, const uint8_t *w, const void *table, int rows, int cols),
      (isum, w, table, rows, cols), isum[rows - 1]++)
WRONG(sign_gemv8, (int32_t *isum, const uint8_t *w, const void *table, int rows, int cols),
      (isum, w, table, rows, cols), isum[rows - 1]++)
WRONG(to_columns, (float *y, const float *x, size_t stride, int n, int wide, int cols),
      (y, x, stride, n, wide, cols), flip(&y[(size_t)wide * (cols - 1) + n - 1]))
WRONG(to_rows, (float *y, const float *x, size_t stride, int n, int wide, int rows, int add),
      (y, x, stride, n, wide, rows, add), flip(&y[stride * (n - 1) + rows - 1]))
WRONG(quantize_many,
      (int16_t *q, float *scale, const float *x, const uint16_t *s, int cols, int wide, int stride, int qmax),
      (q, scale, x, s, cols, wide, stride, qmax), q[(size_t)wide * (cols - 1)] ^= 1)
WRONG(sign_gemm,
      (int32_t *isum, const uint8_t *w, const int16_t *q, uint32_t *work, int rows, int cols, int wide),
      (isum, w, q, work, rows, cols, wide), isum[rows * wide - 1]++)
WRONG(descale_many,
      (float *y, const int32_t *isum, const float *scale, const uint16_t *s, const float *bias, int rows, int wide),
      (y, isum, scale, s, bias, rows, wide), flip(&y[rows * wide - 1]))
WRONG(gemv_f32, (float *y, const float *w, const float *x, int n, int rows, int cols), (y, w, x, n, rows, cols),
      flip(&y[n * rows - 1]))
WRONG(gemv_f16, (float *y, const uint16_t *w, const float *x, int n, int rows, int cols), (y, w, x, n, rows, cols),
      flip(&y[n * rows - 1]))
#define WRONG_GEMV(kernel)                                                                                        \
    WRONG(kernel,                                                                                                 \
          (float *y, const uint8_t *w, const int16_t *q, const float *scale, int n, int rows, int cols),          \
          (y, w, q, scale, n, rows, cols), flip(&y[n * rows - 1]))
WRONG_GEMV(gemv_q4_0)
WRONG_GEMV(gemv_q8_0)
WRONG_GEMV(gemv_q6_k)
WRONG(rmsnorm, (float *y, const float *x, const float *w, float eps, int n), (y, x, w, eps, n), flip(&y[n - 1]))
WRONG(scores, (float *y, const float *x, const float *k, float factor, int n, int dim), (y, x, k, factor, n, dim),
      flip(&y[n - 1]))
WRONG(mix, (float *y, const float *p, const float *v, int n, int dim), (y, p, v, n, dim), flip(&y[dim - 1]))
WRONG(silu_mul, (float *y, const float *gate, const float *up, int n), (y, gate, up, n), flip(&y[n - 1]))
WRONG(add, (float *y, const float *x, int n), (y, x, n), flip(&y[n - 1]))
WRONG(to_f16, (uint16_t *y, const float *x, int n), (y, x, n), y[n - 1] ^= 1)
WRONG(from_f16, (float *y, const uint16_t *x, int n), (y, x, n), flip(&y[n - 1]))

WRONG(to_q8_0, (uint8_t *y, const float *x, int n), (y, x, n), y[n - 1] ^= 1)
WRONG(from_q4_0, (float *y, const uint8_t *x, int n), (y, x, n), flip(&y[n - 1]))
WRONG(from_q6_k, (float *y, const uint8_t *x, int n), (y, x, n), flip(&y[n - 1]))
WRONG(from_q8_0, (float *y, const uint8_t *x, int n), (y, x, n), flip(&y[n - 1]))

#define KERNELS(X) \
    X(quantize) X(quantize_scaled) X(descale) X(sign_gemv) X(sign_gemv8) X(to_columns) X(to_rows) \
    X(quantize_many) X(sign_gemm) X(descale_many) X(gemv_f32) X(gemv_f16) X(gemv_q4_0) X(gemv_q8_0) \
    X(gemv_q6_k) X(rmsnorm) X(scores) X(softmax) X(mix) X(silu_mul) X(add) X(to_f16) X(from_f16) X(to_q8_0) \
    X(from_q4_0) X(from_q8_0) X(from_q6_k)

enum { NONE,
#define NUMBER(kernel) WRONG_##kernel,
       KERNELS(NUMBER) COUNT };
static int wrong = NONE;

static void set_wrong(kernels_t *k, const char *name)
{
    *k = kernels_ref;
    k->name = name;
#define SPOIL(kernel) if (wrong == WRONG_##kernel) k->kernel = wrong_##kernel;
    KERNELS(SPOIL)
}

#if defined(__x86_64__)
#define NAME "avx2"
void kernels_avx2(kernels_t *k)
{
    set_wrong(k, NAME);
}
#elif defined(__aarch64__)
#define NAME "neon"
void kernels_neon(kernels_t *k)
{
    set_wrong(k, NAME);
}
#else
#define NAME ""
#endif

/* 0 if the set was treated as it should be */
static int check(void)
{
    int listed = dbf_isa_use(NAME) == DBF_OK;
    const char *demoted = dbf_isa_demoted();
    if (wrong == NONE) return demoted != NULL;
    if (!demoted) return listed; /* the CPU may lack it */
    return strcmp(demoted, NAME) != 0 || listed || dbf_isa_use("scalar") != DBF_OK || !dbf_isa_active();
}

int main(void)
{
    for (wrong = NONE; wrong < COUNT; wrong++) {
        int status = 1;
        pid_t child = fork();
        if (child == 0) _exit(check());
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
            fprintf(stderr, "demotion: kernel %d of %d\n", wrong, COUNT - 1);
            return 1;
        }
    }
    printf("ok\n");
    return 0;
}
