// Vectors of `LANES` floats, written with the compilers' vector extensions. One lane is one channel.
//
// The including unit defines WK_NAMESPACE, WK_LANES and WK_REGISTERS (the vector registers of the instruction set).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Whether a vector is one register of AVX-512, or of AVX. It is not in the portable unit, nor in those of AVX-512 when they are
// compiled for tests on processors without it (WIDEKERNEL_EMULATE_AVX512); both are written without its instructions.
#define WK_AVX512 (WK_LANES == 16 && __AVX512F__)
#define WK_AVX (WK_AVX512 || (WK_LANES == 8 && __AVX__))

#define WK_INLINE __attribute__((always_inline)) inline

namespace wk {
namespace WK_NAMESPACE {

constexpr int LANES = WK_LANES;
typedef float Vec __attribute__((vector_size(WK_LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(WK_LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(WK_LANES * 4)));

// A vector anywhere in memory.
typedef float Loose __attribute__((vector_size(WK_LANES * 4), aligned(4), may_alias));

// Register tiles of the kernels below: accumulators of R rows × T pixels, together with their operands, must fit.
constexpr int MOST_ROWS = 2;                               // R
constexpr int WIDEST_TILE = WK_REGISTERS >= 32 ? 10 : 5;    // T
constexpr int WIDEST_TRIPLE = WK_REGISTERS >= 32 ? 5 : 4;   // T with three products
constexpr int WIDEST_ROWS = WK_REGISTERS >= 32 ? 4 : 2;     // rows of a transform
constexpr int WIDEST_WAVES = 5;                             // frequencies of a transform

template <class F, int... I> WK_INLINE constexpr void unroll_impl(F &&f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}

// Calls f(0), …, f(N-1) with compile-time arguments.
template <int N, class F> WK_INLINE constexpr void unroll(F &&f) { unroll_impl(f, std::make_integer_sequence<int, N>{}); }

WK_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
WK_INLINE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
WK_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The same value in every lane; subtracting zero changes no value.
WK_INLINE Vec all(float value) { return value - Vec{}; }

// Keeps a value in a register: otherwise the compiler loads the same weight once for every row that uses it.
WK_INLINE void hold(Vec &value) {
#if WK_AVX || (WK_LANES == 4 && __SSE2__)
    asm("" : "+v"(value));
#elif defined(__aarch64__)
    asm("" : "+w"(value));
#elif defined(__x86_64__)
    asm("" : "+m"(value));  // there is no register for it
#else
    (void)value;
#endif
}

// The smaller of a and `bound`, which is not NaN, or `bound` if a is NaN; the compiler would compare and select.
WK_INLINE Vec at_most(const Vec &a, const Vec &bound) {
#if WK_AVX
    Vec smaller;
    asm("vminps %2, %1, %0" : "=v"(smaller) : "v"(a), "v"(bound));
    return smaller;
#else
    return a < bound ? a : bound;
#endif
}

// max(a, 0), but NaN stays NaN.
WK_INLINE Vec relu(const Vec &a) {
#if WK_AVX
    Vec larger;
    asm("vmaxps %2, %1, %0" : "=v"(larger) : "v"(Vec{}), "v"(a));
    return larger;
#else
    return a < Vec{} ? Vec{} : a;
#endif
}

// sum + factor · *at, directly from memory. Otherwise the compiler loads many operands in advance and spills accumulators.
WK_INLINE Vec multiply_add(Vec sum, Vec factor, const Vec *at) {
#if WK_AVX && __FMA__
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(factor), "m"(*at));
    return sum;
#else
    return sum + factor * *at;
#endif
}

template <class T> WK_INLINE T read(const void *from) {
    T value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

template <class T> WK_INLINE void write(void *to, const T &value) { __builtin_memcpy(to, &value, sizeof value); }

// Write a vector without reading its memory into the caches first. The address must be aligned like a vector.
WK_INLINE void write_past_caches(float *to, const Vec &value) {
#if WK_AVX512
    _mm512_stream_ps(to, (__m512)value);
#elif WK_AVX
    _mm256_stream_ps(to, (__m256)value);
#else
    write(to, value);
#endif
}

// Makes what was written past the caches visible to other threads, before this one says that it is done.
WK_INLINE void finish_writes() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

// ---- the three storage types; all computations are in float ------------------------------------------------------------

struct Float32 {
    typedef float Stored;
    static WK_INLINE float one(float value) { return value; }
    static WK_INLINE float back(float value) { return value; }
    static WK_INLINE Vec load(const float *from) { return read<Vec>(from); }
    static WK_INLINE void store(float *to, Vec value) { write(to, value); }
};

struct BFloat16 {
    typedef uint16_t Stored;
    typedef uint16_t Half __attribute__((vector_size(WK_LANES * 2)));

    static WK_INLINE float one(uint16_t value) {
        const uint32_t bits = uint32_t{value} << 16;
        return read<float>(&bits);
    }

    static WK_INLINE uint16_t back(float value) {
        const uint32_t bits = read<uint32_t>(&value);
        // Rounding could turn the bits of a NaN into those of an infinity.
        if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
        return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }

    static WK_INLINE Vec load(const uint16_t *from) {
        return (Vec)(__builtin_convertvector(read<Half>(from), Bits) << 16);
    }

    static WK_INLINE void store(uint16_t *to, Vec value) {
        Bits bits = (Bits)value;
        Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
        Bits is_nan = (Bits)(value != value);
        write(to, __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), Half));
    }
};

struct Float16 {
    typedef uint16_t Stored;

    static WK_INLINE float one(uint16_t half) {
        uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ff, bits;
        if (exponent == 31) {
            bits = sign | 0x7f800000 | (fraction << 13);
        } else if (exponent) {
            bits = sign | ((exponent + 112) << 23) | (fraction << 13);
        } else {
            float small = float(fraction) * (1.0f / 16777216.0f);  // 2^-24, the unit of the subnormal numbers
            bits = sign | read<uint32_t>(&small);
        }
        return read<float>(&bits);
    }

    static WK_INLINE uint16_t back(float value) {
        uint32_t bits = read<uint32_t>(&value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
        if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
        if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 2^16 or more
        if (magnitude < 0x38800000) {
            // Adding 1/2 puts the subnormal half's bits, correctly rounded, at the end of the float's.
            float shifted = read<float>(&magnitude) + 0.5f;
            return static_cast<uint16_t>(sign | (read<uint32_t>(&shifted) - 0x3f000000));
        }
        return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
    }

    static WK_INLINE Vec load(const uint16_t *from) {
#if WK_AVX512
        return (Vec)_mm512_cvtph_ps(read<__m256i>(from));
#elif defined(__F16C__) && WK_LANES == 8
        return (Vec)_mm256_cvtph_ps(read<__m128i>(from));
#elif defined(__aarch64__) && WK_LANES == 4
        return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
        Vec value;
        for (int i = 0; i < LANES; i++) value[i] = one(from[i]);
        return value;
#endif
    }

    static WK_INLINE void store(uint16_t *to, Vec value) {
#if WK_AVX512
        write(to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && WK_LANES == 8
        write(to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__) && WK_LANES == 4
        vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)value)));
#else
        for (int i = 0; i < LANES; i++) to[i] = back(value[i]);
#endif
    }
};

// The first `count` lanes of a vector; the others are read as zero and not written.
template <class Type> WK_INLINE Vec load_some(const typename Type::Stored *from, int count) {
#if WK_AVX512
    if constexpr (sizeof(typename Type::Stored) == 4)
        return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#endif
    Vec value{};
    for (int i = 0; i < count; i++) value[i] = Type::one(from[i]);
    return value;
}

template <class Type> WK_INLINE void store_some(typename Type::Stored *to, Vec value, int count) {
#if WK_AVX512
    if constexpr (sizeof(typename Type::Stored) == 4) {
        _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)value);
        return;
    }
#endif
    for (int i = 0; i < count; i++) to[i] = Type::back(value[i]);
}

// ---- transposition of a square of LANES × LANES --------------------------------------------------------------------------

template <int D, int... I> WK_INLINE void exchange(Vec &a, Vec &b, std::integer_sequence<int, I...>) {
    // From both pairs of blocks of D lanes, `a` gets the first blocks and `b` the second ones.
    Vec first = __builtin_shufflevector(a, b, ((I & D) ? LANES + (I ^ D) : I)...);
    b = __builtin_shufflevector(a, b, ((I & D) ? LANES + I : (I ^ D))...);
    a = first;
}

template <int D> WK_INLINE void transpose_by(Vec (&rows)[LANES]) {
    unroll<LANES>([&](auto i) {
        if constexpr ((i & D) == 0) exchange<D>(rows[i], rows[i + D], std::make_integer_sequence<int, LANES>{});
    });
    if constexpr (D > 1) transpose_by<D / 2>(rows);
}

WK_INLINE void transpose(Vec (&rows)[LANES]) { transpose_by<LANES / 2>(rows); }

}  // namespace WK_NAMESPACE
}  // namespace wk
