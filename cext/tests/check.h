/* check.h - what the tests of the core share: a failure that names its place, and random numbers. */
#ifndef DBF_CHECK_H
#define DBF_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition, ...)                           \
    do {                                                \
        if (!(condition)) {                             \
            fprintf(stderr, "%s: ", __FILE__);          \
            fprintf(stderr, __VA_ARGS__);               \
            fprintf(stderr, " (line %d)\n", __LINE__);  \
            exit(1);                                    \
        }                                               \
    } while (0)

static uint32_t next(void)
{
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

#endif
