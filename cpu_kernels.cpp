/*
Causal attention on a CPU, forward and backward, for one head width D and one type of numbers, which cpu_kernels.py chooses.

A block of L queries stands in the L lanes of vectors, and keys come one after the other, as scalars that go to all lanes. So a
softmax needs no sum across lanes, an odd D costs next to nothing, and of the scores that the mask hides only those in squares of
L x L on the diagonal are computed. No score leaves the cache: the forward pass keeps y and, of each query, the log-sum-exp of its
scores to base 2, from which the backward pass computes the weights again (FlashAttention, arXiv:2205.14135). It turns squares of
weights around for the gradients of keys and values, whose lanes are keys. Sums are float32.

Products are of units of 32 bits: one float, or two neighbours in bfloat16, of which CPUs with AVX512-BF16 add two products at
once. The two neighbours of a unit are channels in products of queries and keys, and tokens in weighted sums of rows.

Shapes: T tokens, D head width, W numbers of a unit, P units of a row of D numbers, L lanes. Rows behind T are zeros.
*/

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#if BF16
#include <immintrin.h>  // everything else here is vector extensions of GCC and Clang
#endif

#if defined(__AVX512F__)
constexpr int L = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int L = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int L = 4, REGISTERS = 32;
#else
constexpr int L = 4, REGISTERS = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * L)));
typedef int32_t Ints __attribute__((vector_size(4 * L)));
typedef uint32_t Bits __attribute__((vector_size(4 * L)));

constexpr int D = HEAD_WIDTH;
constexpr int G = std::min(L, 8);  // keys at a time: as many sums hide how long one addition takes
const float SCALE = 1 / std::sqrt(float(D)), TO_BASE_2 = SCALE * 1.44269504f;

// ---------------------------------------------------------------------------------------------------------------------
// numbers

#if BF16
typedef uint16_t Number __attribute__((may_alias));  // the upper half of a float
typedef uint32_t Unit;                               // two of them, the first in the lower half
typedef Bits Units;

inline Floats multiply_add(Units a, Units b, Floats sum) {
    return Floats(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
}
inline Floats multiply_add(Unit a, Units b, Floats sum) { return multiply_add(Units(_mm512_set1_epi32(a)), b, sum); }

// Two vectors as the rows of one: L / 2 units of neighbours in x[0], then those of x[1].
inline Units as_rows(const Floats *x) { return Units(_mm512_cvtne2ps_pbh(__m512(x[1]), __m512(x[0]))); }

// Of such rows, lane i of both as unit i.
inline Units as_columns(Units rows) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return Units(_mm512_permutexvar_epi16(order, __m512i(rows)));
}
inline Unit joined(const Number *x, int step) { return x[0] | Unit(x[step]) << 16; }

inline float widened(Number x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline Number narrowed(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + (x == x ? 0x7fff + (bits >> 16 & 1) : 0)) >> 16;  // to the nearest, ties to even; NaN as it is
}
#else
typedef float Number, Unit;
typedef Floats Units;

inline Floats multiply_add(Unit a, Units b, Floats sum) { return sum + a * b; }
inline Floats multiply_add(Units a, Units b, Floats sum) { return sum + a * b; }
inline Units as_rows(const Floats *x) { return x[0]; }
inline Units as_columns(Units rows) { return rows; }
inline Unit joined(const Number *x, int) { return x[0]; }
inline float widened(Number x) { return x; }
inline Number narrowed(float x) { return x; }
#endif

constexpr int W = sizeof(Unit) / sizeof(Number);
constexpr int P = (D + W - 1) / W;

inline Floats all(float x) { return x - Floats{}; }
inline Ints lanes() {
    Ints x;
    for (int i = 0; i < L; i++) x[i] = i;
    return x;
}

// 2^x for x <= 0, exactly 0 from -126.5 on, with a relative error of 2e-7, or 8e-5 where the result is rounded to bfloat16 anyway.
inline Floats exp2(Floats x) {
    constexpr float by_degree[2][6] = {{1.00000007f, 0.693146967f, 0.240221197f, 0.0555071327f, 0.00967554133f, 0.00132764718f},
                                       {0.999928074f, 0.693260986f, 0.242611122f, 0.0551716672f}};
    constexpr int degree = BF16 ? 3 : 5;
    constexpr float shift = 1.5f * (1 << 23) + 127;
    x = all(-127) > x ? all(-127) : x;  // in this order NaN stays NaN
    Floats shifted = x + shift;         // its last bits are the nearest integer to x, plus 127: the exponent of the result
    Floats rest = x - (shifted - shift), y = all(by_degree[BF16][degree]);
    for (int i = degree - 1; i >= 0; i--) y = y * rest + by_degree[BF16][i];
    return y * Floats(Ints(shifted) << 23);
}

// ---------------------------------------------------------------------------------------------------------------------
// dropout

inline Bits mixed(Bits x) {  // every bit of the result depends on all of x; constants of Wellons's lowbias32
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// Which weights of a head are dropped: a function of seed, head, query and key, so the backward pass finds the same ones.
struct Dropout {
    int dropped;   // of 2^16
    float factor;  // of the others
    uint32_t of_queries, of_keys;

    Dropout(int64_t seed, int dropped, int64_t head) : dropped(dropped), factor(65536.f / (65536 - dropped)) {
        uint64_t x = seed + head * 0x9e3779b97f4a7c15u;  // splitmix64: Steele, Lea and Flood 2014
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        x ^= x >> 31;
        of_queries = x, of_keys = x >> 32;
    }
    Bits queries(int first) const { return mixed(Bits(lanes()) + (of_queries + first)); }

    // Whether each query keeps its weights of the keys 2 n and 2 n + 1, for which a hash has 16 bits each.
    void keep(Ints *kept, Bits queries, int n) const {
        uint32_t key = (of_keys + n) * 0x9e3779b1u;
        Bits hash = mixed(queries ^ (key ^ key >> 15));
        kept[0] = Ints(hash & 0xffff) >= dropped;
        kept[1] = Ints(hash >> 16) >= dropped;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// pieces

struct Matrix {  // (T, D)
    Number *data;
    int64_t stride;  // numbers from one row to the next
    Number *row(int t) const { return data + t * stride; }
};

struct Tensor {  // (B, H, T, D)
    Number *data;
    int64_t H, of_b, of_h, of_t;  // strides; that of D is 1
    Matrix head(int64_t i) const { return {data + i / H * of_b + i % H * of_h, of_t}; }
};

// Rotary positions, arXiv:2104.09864, eq. 34: cos and sin (T, D / 2) of the angles by which channels i and i + D / 2 turn; or none.
struct Rotary {
    const float *cos, *sin;
    void operator()(Number *row, int t, float direction) const {
        constexpr int half = D / 2;
        if (!cos) return;
        for (int i = 0; i < half; i++) {
            const float a = widened(row[i]), b = widened(row[i + half]), c = cos[t * half + i], s = direction * sin[t * half + i];
            row[i] = narrowed(a * c - b * s), row[i + half] = narrowed(b * c + a * s);
        }
    }
};

// n rows from t on, as units (n, P). Rows lie far apart, so those of the next block are asked for while this one is computed.
inline void read(Unit *out, Matrix x, int t, int n, Rotary rotary = {}) {
    for (int i = 0; i < n; i++) {
        std::memcpy(out + i * P, x.row(t + i), D * sizeof(Number));
        rotary((Number *)(out + i * P), t + i, 1);
        for (int d = 0; d < D; d += 64 / sizeof(Number)) __builtin_prefetch(x.row(t + i + L) + d);
        __builtin_prefetch(x.row(t + i + L) + D - 1);
    }
}

// Rows (L, P) -> columns (P, L).
inline void across(Units *out, const Unit *rows) {
    for (int p = 0; p < P; p++)
        for (int i = 0; i < L; i++) out[p][i] = rows[i * P + p];
}

// Rows (L, P) -> (L / W, D): units of neighbours in time.
inline void along(Unit *out, const Unit *rows) {
    for (int i = 0; i < L; i += W, rows += W * P, out += D)
        for (int d = 0; d < D; d++) out[d] = joined((const Number *)rows + d, W * P);
}

// Columns (D, L) -> the rows of a matrix from t on, n of them, turned back.
inline void write(Matrix y, int t, const Floats *columns, int n, Rotary rotary = {}) {
    Unit rows[L][P];
    for (int p = 0; p < P; p++) {
        Floats x[2] = {columns[p * W], p * W + 1 < D ? columns[p * W + 1] : Floats{}};
        Units units = as_columns(as_rows(x));
        for (int i = 0; i < L; i++) rows[i][p] = units[i];
    }
    for (int i = 0; i < n; i++) {
        rotary((Number *)rows[i], t + i, -1);
        std::memcpy(y.row(t + i), rows[i], D * sizeof(Number));
    }
}

// out[g] = sum over p of rows[g][p] columns[p]: products of G rows (G, P) with the L rows whose columns (P, L) these are.
inline void dots(Floats *out, const Unit *rows, const Units *columns) {
    Floats sum[G] = {};  // in registers: `out` may be memory that rows are read from, for all a compiler knows
    for (int p = 0; p < P; p++) {
        Units column = columns[p];
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) sum[g] = multiply_add(rows[g * P + p], column, sum[g]);
    }
    for (int g = 0; g < G; g++) out[g] = sum[g];
}

// out[d] = sum over j < n of values[j][d] weights[j], values (n, D): as many channels at a time as sums fit into registers.
template <int FIRST = 0> inline void weigh(Floats *out, const Unit *values, const Units *weights, int n) {
    if constexpr (FIRST < D) {
        constexpr int parts = (D - FIRST - 1) / (REGISTERS * 3 / 4) + 1, count = (D - FIRST + parts - 1) / parts;
        Floats sum[count] = {};
        for (int j = 0; j < n; j++) {
            Units weight = weights[j];
#pragma GCC unroll 32
            for (int d = 0; d < count; d++) sum[d] = multiply_add(values[j * D + FIRST + d], weight, sum[d]);
        }
        for (int d = 0; d < count; d++) out[FIRST + d] = sum[d];
        weigh<FIRST + count>(out, values, weights, n);
    }
}

#if defined(__clang__) || __GNUC__ >= 12
template <int FIRST, int... I> inline Units every_second(Units a, Units b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I + FIRST)...);
}
template <int FIRST> inline Units every_second(Units a, Units b) {
    return every_second<FIRST>(a, b, std::make_integer_sequence<int, L>());
}
#else
template <int FIRST> inline Units every_second(Units a, Units b) {
    Units out;
    for (int i = 0; i < L; i++) out[i] = i < L / 2 ? a[2 * i + FIRST] : b[2 * i + FIRST - L];
    return out;
}
#endif

// A square of weights, rows of keys -> rows of queries. Each round moves the lowest bit of a unit's address to the top.
inline void turn(Units *square) {
    constexpr int n = L / W;
    for (int round = 1; round < L / W; round *= 2) {
        Units out[n];
#pragma GCC unroll 8
        for (int i = 0; i < n / 2; i++) {
            out[i] = every_second<0>(square[2 * i], square[2 * i + 1]);
            out[i + n / 2] = every_second<1>(square[2 * i], square[2 * i + 1]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) square[i] = out[i];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// a head

int whole(int T) { return (T + 15) / 16 * 16; }  // T rounded up to 16, which every L divides: rows of queries and of keys

struct Forward {
    std::vector<Unit> keys, values;  // (T, P) and (T / W, D)
    std::vector<Floats> scores;
    std::vector<Units> weights;

    Forward(int T) : keys(T * P), values(T / W * D), scores(T), weights(T / W) {}

    void operator()(const Tensor *x, int64_t head, float *lse, int T, const Dropout &dropout, Rotary rotary) {
        const Matrix q = x[0].head(head), k = x[1].head(head), v = x[2].head(head), y = x[3].head(head);
        for (int i = 0; i < T; i += L) {
            const int n = std::min(L, T - i);
            Unit q_rows[L * P] = {}, v_rows[L * P] = {};
            Units queries[P];
            read(q_rows, q, i, n, rotary), across(queries, q_rows);
            read(v_rows, v, i, n), along(&values[i / W * D], v_rows);
            read(&keys[i * P], k, i, n, rotary);
            Floats top = all(-INFINITY), sum = {}, out[D];
            for (int j = 0; j < i + L; j += G) {
                Floats *s = &scores[j];
                dots(s, &keys[j * P], queries);
                for (int g = 0; g < G; g++) {
                    if (j >= i) s[g] = lanes() >= j + g - i ? s[g] : all(-INFINITY);
                    top = s[g] > top ? s[g] : top;
                }
            }
            top *= TO_BASE_2;
            const Bits hashes = dropout.queries(i);
            for (int j = 0; j < i + L; j += 2) {
                Floats weight[2];
                for (int g = 0; g < 2; g++) sum += weight[g] = exp2(scores[j + g] * TO_BASE_2 - top);
                if (dropout.dropped) {
                    Ints kept[2];
                    dropout.keep(kept, hashes, j / 2);
                    for (int g = 0; g < 2; g++) weight[g] = kept[g] ? weight[g] : Floats{};
                }
                for (int g = 0; g < 2; g += W) weights[(j + g) / W] = as_columns(as_rows(weight + g));
            }
            weigh(out, values.data(), weights.data(), (i + L) / W);
            for (int d = 0; d < D; d++) out[d] *= dropout.factor / sum;
            write(y, i, out, n);
            for (int a = 0; a < n; a++) lse[i + a] = top[a] + std::log2(sum[a]);
        }
    }
};

struct Backward {
    std::vector<Unit> k_rows, v_rows, keys;  // (T, P), and of keys (T / W, D)
    std::vector<Units> weights;
    std::vector<Floats> sum_k, sum_v;  // gradients of keys and values so far: (T / L, D, L)

    Backward(int T) : k_rows(T * P), v_rows(T * P), keys(T / W * D), weights(T / W), sum_k(T / L * D), sum_v(T / L * D) {}

    void operator()(const Tensor *x, int64_t head, const float *lse, int T, const Dropout &dropout, Rotary rotary) {
        const Matrix q = x[0].head(head), k = x[1].head(head), v = x[2].head(head), y = x[3].head(head), g = x[4].head(head);
        const Matrix dq = x[5].head(head), dk = x[6].head(head), dv = x[7].head(head);
        std::fill(sum_k.begin(), sum_k.end(), Floats{});
        std::fill(sum_v.begin(), sum_v.end(), Floats{});
        for (int i = 0; i < T; i += L) {
            const int n = std::min(L, T - i);
            Unit q_rows[L * P] = {}, g_rows[L * P] = {}, y_rows[L * P] = {}, queries[L / W * D], grads[L / W * D];
            Units q_columns[P], g_columns[P], y_columns[P];
            read(q_rows, q, i, n, rotary), across(q_columns, q_rows), along(queries, q_rows);
            read(g_rows, g, i, n), across(g_columns, g_rows), along(grads, g_rows);
            read(y_rows, y, i, n), across(y_columns, y_rows);
            read(&k_rows[i * P], k, i, n, rotary), along(&keys[i / W * D], &k_rows[i * P]);
            read(&v_rows[i * P], v, i, n);
            Floats delta = {}, log_sum = {}, out[D];  // delta: what the softmax takes off
            for (int p = 0; p < P; p++) delta = multiply_add(g_columns[p], y_columns[p], delta);
            for (int a = 0; a < n; a++) log_sum[a] = lse[i + a];
            const Bits hashes = dropout.queries(i);
            for (int j = 0; j <= i; j += L) {
                Units used[L / W], grad[L / W];  // squares of weights and of gradients of scores
                for (int h = 0; h < L; h += G) {
                    Floats p[G], dp[G];
                    dots(p, &k_rows[(j + h) * P], q_columns);
                    for (int a = 0; a < G; a++) {
                        p[a] = exp2(p[a] * TO_BASE_2 - log_sum);
                        if (j == i) p[a] = lanes() >= h + a ? p[a] : Floats{};
                    }
                    dots(dp, &v_rows[(j + h) * P], g_columns);
                    for (int a = 0; a < G; a += 2) {
                        Floats weight[2] = {p[a], p[a + 1]}, ds[2];
                        if (dropout.dropped) {
                            Ints kept[2];
                            dropout.keep(kept, hashes, (j + h + a) / 2);
                            for (int b = 0; b < 2; b++) {
                                weight[b] = kept[b] ? weight[b] : Floats{};
                                dp[a + b] = kept[b] ? dp[a + b] * dropout.factor : Floats{};
                            }
                        }
                        for (int b = 0; b < 2; b++) ds[b] = p[a + b] * (dp[a + b] - delta);
                        for (int b = 0; b < 2; b += W) {
                            used[(h + a + b) / W] = as_rows(weight + b);
                            grad[(h + a + b) / W] = as_rows(ds + b);
                            weights[(j + h + a + b) / W] = as_columns(grad[(h + a + b) / W]);
                        }
                    }
                }
                turn(used), turn(grad);
                for (int d = 0; d < D; d++) {
                    Floats of_k = sum_k[j / L * D + d], of_v = sum_v[j / L * D + d];
                    for (int a = 0; a < L / W; a++) {
                        of_v = multiply_add(grads[a * D + d], used[a], of_v);
                        of_k = multiply_add(queries[a * D + d], grad[a], of_k);
                    }
                    sum_k[j / L * D + d] = of_k, sum_v[j / L * D + d] = of_v;
                }
            }
            weigh(out, keys.data(), weights.data(), (i + L) / W);
            for (int d = 0; d < D; d++) out[d] *= SCALE;
            write(dq, i, out, n, rotary);
        }
        for (int j = 0; j < T; j += L) {
            Floats *of_k = &sum_k[j / L * D], *of_v = &sum_v[j / L * D];
            for (int d = 0; d < D; d++) of_k[d] *= SCALE, of_v[d] *= dropout.factor;
            write(dk, j, of_k, std::min(L, T - j), rotary);
            write(dv, j, of_v, std::min(L, T - j));
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// all heads: what cpu_kernels.py calls

struct Call {
    int64_t B, H, T, seed, dropped, threads;
    Rotary rotary;
};

template <class Work> void each_head(const Call &call, const Tensor *x, float *lse) {
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
    {
        Work work(whole(call.T));
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < call.B * call.H; i++)
            work(x, i, lse + i * call.T, call.T, Dropout(call.seed, call.dropped, i), call.rotary);
    }
}

extern "C" void forward(const Call *call, const Tensor *q_k_v_y, float *lse) { each_head<Forward>(*call, q_k_v_y, lse); }
extern "C" void backward(const Call *call, const Tensor *q_k_v_y_g_dq_dk_dv, float *lse) {
    each_head<Backward>(*call, q_k_v_y_g_dq_dk_dv, lse);
}
