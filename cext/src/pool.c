/* pool.c - persistent threads and a barrier that spins for a while, then sleeps.
 *
 * Spinning costs a fraction of a microsecond where every thread has a core; sleeping keeps the pool correct and
 * cheap where it has not, and while nothing runs. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "../dbf.h"
#include "clock.h"

/* Nanoseconds to spin, by the clock: one pause takes 40 cycles on one CPU and 140 on the next. Where a wait ended in
 * sleep, the cores are probably shared, and spinning keeps the awaited thread from running: later spins are short. */
#define SPIN_MAX 50000
#define SPIN_MIN 2000
#define PAUSES 16 /* between two looks at the clock */

#if defined(__x86_64__) || defined(__i386__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX() ((void)0)
#endif

/* a counter that threads wait on; its users raise it by one at a time */
typedef struct gate {
    _Alignas(64) atomic_uint count;
    atomic_int sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
} gate_t;

typedef struct worker {
    _Alignas(64) atomic_ullong items; /* of its part that nobody has taken: the first, and 2^32 times the end */
    pool_t *pool;
    pthread_t handle;
    int thread;
} worker_t;

struct pool {
    gate_t start, phase; /* a job begins; all threads reached the barrier */
    _Alignas(64) atomic_int arrived;
    int n_threads, n_started, stop;
    pid_t owner; /* threads do not survive fork() */
    void (*fn)(void *arg, int thread);
    void *arg;
    pthread_mutex_t busy;
    worker_t *workers;
};

static void gate_init(gate_t *gate)
{
    atomic_init(&gate->count, 0);
    atomic_init(&gate->sleepers, 0);
    pthread_mutex_init(&gate->mutex, NULL);
    pthread_cond_init(&gate->changed, NULL);
}

static void gate_destroy(gate_t *gate)
{
    pthread_cond_destroy(&gate->changed);
    pthread_mutex_destroy(&gate->mutex);
}

static void gate_open(gate_t *gate)
{
    atomic_fetch_add(&gate->count, 1);
    /* Either this sees the sleeper, or the sleeper, which registers before it looks, sees the new count. */
    if (atomic_load(&gate->sleepers) > 0) {
        pthread_mutex_lock(&gate->mutex);
        pthread_cond_broadcast(&gate->changed);
        pthread_mutex_unlock(&gate->mutex);
    }
}

/* wait until the count is no longer `seen`; returns how long to spin next time, if this time it was `spin` */
static int64_t gate_wait(gate_t *gate, unsigned seen, int64_t spin)
{
    for (int64_t end = 0;;) {
        for (int i = 0; i < PAUSES; i++) {
            if (atomic_load_explicit(&gate->count, memory_order_acquire) != seen)
                return spin + spin / 8 < SPIN_MAX ? spin + spin / 8 : SPIN_MAX;
            RELAX();
        }
        int64_t now = clock_ns();
        if (end == 0) end = now + spin;
        if (now >= end) break;
    }
    pthread_mutex_lock(&gate->mutex);
    atomic_fetch_add(&gate->sleepers, 1);
    while (atomic_load(&gate->count) == seen) pthread_cond_wait(&gate->changed, &gate->mutex);
    atomic_fetch_sub(&gate->sleepers, 1);
    pthread_mutex_unlock(&gate->mutex);
    return spin / 4 > SPIN_MIN ? spin / 4 : SPIN_MIN;
}

void pool_barrier(pool_t *pool)
{
    static _Thread_local int64_t spin = SPIN_MAX;
    if (pool->n_threads == 1) return;
    unsigned seen = atomic_load_explicit(&pool->phase.count, memory_order_acquire);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 == pool->n_threads) {
        atomic_store(&pool->arrived, 0);
        gate_open(&pool->phase);
    } else {
        spin = gate_wait(&pool->phase, seen, spin);
    }
}

static void *work(void *arg)
{
    worker_t *self = arg;
    pool_t *pool = self->pool;
    for (unsigned seen = 0;; seen++) {
        gate_wait(&pool->start, seen, SPIN_MAX);
        if (pool->stop) return NULL;
        pool->fn(pool->arg, self->thread);
        pool_barrier(pool);
    }
}

int pool_run(pool_t *pool, void (*fn)(void *arg, int thread), void *arg)
{
    if (pool->n_threads > 1 && getpid() != pool->owner) return DBF_ETHREAD;
    pthread_mutex_lock(&pool->busy);
    pool->fn = fn;
    pool->arg = arg;
    if (pool->n_threads > 1) gate_open(&pool->start);
    fn(arg, 0);
    pool_barrier(pool);
    pthread_mutex_unlock(&pool->busy);
    return DBF_OK;
}

int pool_new(pool_t **out, int n_threads)
{
    pool_t *pool = aligned_alloc(64, (sizeof *pool + 63) / 64 * 64);
    worker_t *workers = aligned_alloc(64, (size_t)n_threads * sizeof *workers);
    if (!pool || !workers) {
        free(pool);
        free(workers);
        return DBF_ENOMEM;
    }
    gate_init(&pool->start);
    gate_init(&pool->phase);
    atomic_init(&pool->arrived, 0);
    pthread_mutex_init(&pool->busy, NULL);
    pool->n_threads = n_threads;
    pool->n_started = 0;
    pool->stop = 0;
    pool->owner = getpid();
    pool->workers = workers;
    for (int i = 0; i < n_threads; i++) {
        workers[i].pool = pool;
        workers[i].thread = i;
        atomic_init(&workers[i].items, 0);
    }
    for (int i = 1; i < n_threads; i++) {
        if (pthread_create(&workers[i].handle, NULL, work, &workers[i]) != 0) {
            pool_free(pool);
            return DBF_ETHREAD;
        }
        pool->n_started++;
    }
    *out = pool;
    return DBF_OK;
}

void pool_free(pool_t *pool)
{
    if (!pool) return;
    if (getpid() == pool->owner) {
        pool->stop = 1;
        gate_open(&pool->start);
        for (int i = 1; i <= pool->n_started; i++) pthread_join(pool->workers[i].handle, NULL);
        gate_destroy(&pool->start);
        gate_destroy(&pool->phase);
        pthread_mutex_destroy(&pool->busy);
    }
    free(pool->workers);
    free(pool);
}

int pool_threads(const pool_t *pool)
{
    return pool->n_threads;
}

void pool_split(const pool_t *pool, int thread, int n, int *begin, int *end)
{
    *begin = (int)((int64_t)n * thread / pool->n_threads);
    *end = (int)((int64_t)n * (thread + 1) / pool->n_threads);
}

static unsigned long long items_of(unsigned begin, unsigned end)
{
    return begin | (unsigned long long)end << 32;
}

/* A thread's items are all taken when it shares new ones, as a barrier lies between: who helps others sees the new
 * ones or none. */
void pool_share(pool_t *pool, int thread, int n)
{
    int begin, end;
    pool_split(pool, thread, n, &begin, &end);
    atomic_store_explicit(&pool->workers[thread].items, items_of((unsigned)begin, (unsigned)end), memory_order_release);
}

int pool_take(pool_t *pool, int thread)
{
    for (int i = 0; i < pool->n_threads; i++) {
        atomic_ullong *items = &pool->workers[(thread + i) % pool->n_threads].items;
        unsigned long long seen = atomic_load_explicit(items, memory_order_acquire);
        for (;;) {
            unsigned begin = (unsigned)seen, end = (unsigned)(seen >> 32);
            if (begin >= end) break;
            if (pool->n_threads == 1) { /* nobody else: without the price of an exchange */
                atomic_store_explicit(items, items_of(begin + 1, end), memory_order_relaxed);
                return (int)begin;
            }
            /* its own in order, those of others from behind */
            unsigned long long rest = i == 0 ? items_of(begin + 1, end) : items_of(begin, end - 1);
            if (atomic_compare_exchange_weak(items, &seen, rest)) return (int)(i == 0 ? begin : end - 1);
        }
    }
    return -1;
}
