/* pool.h - threads that live as long as a model. */
#ifndef DBF_POOL_H
#define DBF_POOL_H

typedef struct pool pool_t;

int pool_new(pool_t **out, int n_threads); /* the caller is thread 0, n_threads - 1 are started */
void pool_free(pool_t *pool);
int pool_threads(const pool_t *pool);

/* Run fn(arg, thread) on every thread and return when all are done. Callers are served one at a time. */
int pool_run(pool_t *pool, void (*fn)(void *arg, int thread), void *arg);

void pool_barrier(pool_t *pool); /* inside fn: wait for all threads */

/* the part [*begin, *end) of 0 .. n-1 that is thread's */
void pool_split(const pool_t *pool, int thread, int n, int *begin, int *end);

/* The same, but a thread that is done helps the others: every thread calls pool_share, then pool_take until it
 * returns -1, and goes on to a barrier. Each of 0 .. n-1 is returned once, to a thread its own part in order. */
void pool_share(pool_t *pool, int thread, int n);
int pool_take(pool_t *pool, int thread);

#endif
