/* The fit of a tensor ring of six cores to a 3x3x3x3x3x3 tensor by Adam, in single precision.

   All matrices are dense and row by row. A product is computed in whole vectors: what it reads and
   writes behind the end of a row is of the next row, which is written later, or of a gap of SLACK
   numbers that follows every matrix. */

#include <math.h>
#include <string.h>

enum { ORDER = 6, MODE = 3, MOST = 7, SIDE = 27, LANES = 16, SLACK = 64 };
enum { CORE = MODE * MOST * MOST + SLACK, HALF = SIDE * MOST * MOST + SLACK };

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* c [m, n] = a [m, k] b [k, n], element (i, j) of a at a[i * down + j * right]; n <= 16 wide. */
static inline __attribute__((always_inline)) void strips(int wide, int m, int n, int k,
    const float *a, int down, int right, const float *b, float *c)
{
    for (int i = 0; i < m; i += 4) {
        int rows = m - i < 4 ? m - i : 4;
        vector sum[4][4];
        memset(sum, 0, sizeof sum);
        for (int l = 0; l < k; l++)
            for (int r = 0; r < 4; r++) {
                float factor = a[(i + (r < rows ? r : 0)) * down + l * right];
                for (int v = 0; v < wide; v++)
                    sum[r][v] += factor * *(const vector *)(b + l * n + v * LANES);
            }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < wide; v++)
                *(vector *)(c + (i + r) * n + v * LANES) = sum[r][v];
    }
}

static void product(int m, int n, int k, const float *a, int down, int right, const float *b,
    float *c)
{
    switch ((n + LANES - 1) / LANES) {
    case 1: strips(1, m, n, k, a, down, right, b, c); break;
    case 2: strips(2, m, n, k, a, down, right, b, c); break;
    case 3: strips(3, m, n, k, a, down, right, b, c); break;
    default: strips(4, m, n, k, a, down, right, b, c);
    }
}

/* to [n, m] = from [m, n] turned. */
static void turned(int m, int n, const float *from, float *to)
{
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++)
            to[j * m + i] = from[i * n + j];
}

/* Three cores of ranks r[0..3] joined: pair [r0, 9, r2] and half [r0, 27, r3]. */
static void joined(const int *r, float core[][CORE], float *pair, float *half)
{
    product(MODE * r[0], MODE * r[2], r[1], core[0], r[1], 1, core[1], pair);
    product(9 * r[0], MODE * r[3], r[2], pair, r[2], 1, core[2], half);
}

/* The slopes of three cores from that of what they are joined to, up [r0, 27, r3]. */
static void parted(const int *r, float core[][CORE], const float *pair, const float *up,
    float slope[][CORE])
{
    static _Thread_local float under[HALF], other[CORE];
    product(r[2], MODE * r[3], 9 * r[0], pair, 1, r[2], up, slope[2]);
    turned(r[2], MODE * r[3], core[2], other);
    product(9 * r[0], r[2], MODE * r[3], up, MODE * r[3], 1, other, under);
    product(r[1], MODE * r[2], MODE * r[0], core[0], 1, r[1], under, slope[1]);
    turned(r[1], MODE * r[2], core[1], other);
    product(MODE * r[0], r[1], MODE * r[2], under, MODE * r[2], 1, other, slope[0]);
}

/* The squared error of the ring of cores, and its slopes. */
static float slopes(const int *r, float core[][CORE], const float *goal, float slope[][CORE])
{
    static _Thread_local float pair[2][HALF], half[2][HALF], left[HALF], right[HALF];
    static _Thread_local float across[HALF], back[HALF], rest[SIDE * SIDE + SLACK];
    int a = r[0], d = r[3], all = a * d;
    joined(r, core, pair[0], half[0]);
    joined(r + 3, core + 3, pair[1], half[1]);
    for (int i = 0; i < a; i++)
        for (int s = 0; s < SIDE; s++)
            memcpy(left + s * all + i * d, half[0] + (i * SIDE + s) * d, 4 * d);
    for (int j = 0; j < d; j++) /* right [a, d, 27], across [27, a, d] */
        for (int s = 0; s < SIDE; s++)
            for (int i = 0; i < a; i++)
                right[(i * d + j) * SIDE + s] = half[1][(j * SIDE + s) * a + i];
    product(SIDE, SIDE, all, left, all, 1, right, rest);
    float error = 0;
    for (int i = 0; i < SIDE * SIDE; i++) {
        rest[i] -= goal[i];
        error += rest[i] * rest[i];
        rest[i] *= 2;
    }
    turned(all, SIDE, right, across);
    product(SIDE, all, SIDE, rest, SIDE, 1, across, right);
    for (int i = 0; i < a; i++)
        for (int s = 0; s < SIDE; s++)
            memcpy(half[0] + (i * SIDE + s) * d, right + s * all + i * d, 4 * d);
    product(SIDE, all, SIDE, rest, 1, SIDE, left, back);
    for (int s = 0; s < SIDE; s++)
        for (int i = 0; i < a; i++)
            for (int j = 0; j < d; j++)
                half[1][(j * SIDE + s) * a + i] = back[s * all + i * d + j];
    parted(r, core, pair[0], half[0], slope);
    parted(r + 3, core + 3, pair[1], half[1], slope + 3);
    return error;
}

/* The least squared error of `steps` steps of Adam (Kingma and Ba 2015, arXiv 1412.6980) from the
   cores given one after the other; ended at an error of `enough`. ranks: the one before each core.
   goal: [27, 27]. */
float fit(const int *ranks, const float *start, const float *goal, int steps, float rate,
    float enough)
{
    static _Thread_local float core[ORDER][CORE], slope[ORDER][CORE];
    static _Thread_local float mean[ORDER][CORE], square[ORDER][CORE];
    int r[ORDER + 1], size[ORDER];
    memset(mean, 0, sizeof mean);
    memset(square, 0, sizeof square);
    for (int k = 0; k <= ORDER; k++)
        r[k] = ranks[k % ORDER];
    for (int k = 0; k < ORDER; k++) {
        size[k] = r[k] * MODE * r[k + 1];
        memcpy(core[k], start, 4 * size[k]);
        start += size[k];
    }
    float least = INFINITY;
    double first = 1, second = 1;
    for (int step = 0; step < steps; step++) {
        float error = slopes(r, core, goal, slope);
        if (error < least)
            least = error;
        if (least < enough)
            break;
        first *= 0.9;
        second *= 0.999;
        float by = rate / (1 - first), unit = 1 / sqrt(1 - second);
        for (int k = 0; k < ORDER; k++)
            for (int i = 0; i < size[k]; i++) {
                float g = slope[k][i];
                float m = mean[k][i] = 0.9f * mean[k][i] + 0.1f * g;
                float v = square[k][i] = 0.999f * square[k][i] + 0.001f * g * g;
                core[k][i] -= by * m / (sqrtf(v) * unit + 1e-8f);
            }
    }
    return least;
}
