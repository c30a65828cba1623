// The instruction sets that both the processor and the operating system support.
//
// Asked directly, because `__builtin_cpu_supports` needs a run-time library that some toolchains lack, and older compilers do
// not know every name.
#pragma once

#if defined(__x86_64__)

#include <cpuid.h>

#include <cstdint>

namespace wk {

// Bits of the registers that `cpuid` fills in; `enabled` are the registers that the operating system saves for each thread.
struct Processor {
    uint32_t basic = 0, extended = 0, more = 0, further = 0, enabled = 0;
    uint32_t vendor = 0;  // the first letters of the vendor's name
    uint32_t family = 0;

    static Processor present() {
        Processor found;
        uint32_t a, b, c, d;
        constexpr uint32_t saves_extended_state = 1u << 27;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & saves_extended_state)) return found;
        found.basic = c, found.family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
        asm("xgetbv" : "=a"(found.enabled), "=d"(d) : "c"(0));
        if (__get_cpuid(0, &a, &b, &c, &d)) found.vendor = b;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
        found.extended = b, found.more = c;
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found.further = a;
        return found;
    }

    bool avx2() const {
        constexpr uint32_t fma = 1u << 12, f16c = 1u << 29, avx2 = 1u << 5, saved = 0x6;
        return has(basic, fma | f16c) && has(extended, avx2) && has(enabled, saved);
    }

#ifdef WIDEKERNEL_EMULATE_AVX512
    // Its units are compiled for AVX2.
    bool avx512() const { return avx2(); }
    bool avx512_bf16() const { return avx2(); }
    bool avx512_vnni() const { return avx2(); }
#else
    bool avx512() const {
        constexpr uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, saved = 0xe6;
        return avx2() && has(extended, f | dq | bw | vl) && has(enabled, saved);
    }

    bool avx512_bf16() const {
        constexpr uint32_t bf16 = 1u << 5;
        return avx512() && has(further, bf16);
    }

    bool avx512_vnni() const {
        constexpr uint32_t vnni = 1u << 11;
        return avx512() && has(more, vnni);
    }
#endif

    bool is_amd() const { return vendor == 0x68747541; }  // "Auth"

    // It computes vectors of 512 bits in two halves: one multiply-add in a cycle instead of two.
    bool is_zen4() const {
        constexpr uint32_t zen_3_and_4 = 0x19;
        return is_amd() && avx512() && family == zen_3_and_4;
    }

  private:
    static bool has(uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; }
};

}  // namespace wk

#endif
