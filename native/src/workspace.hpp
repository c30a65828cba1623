// Working memory: one block per thread, grown when a call needs more, and reused by the next call.
#pragma once

#include "simd.hpp"

#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace wk {
namespace WK_NAMESPACE {

constexpr int64_t ALIGNMENT = 64;
constexpr int64_t HUGE_PAGE = int64_t{2} << 20;
// A thread that needed more than this returns the memory after the call.
constexpr int64_t KEPT_BYTES = int64_t{64} << 20;

// Memory for `std::free`; null if there is none. Whole huge pages of a large block become such if the system permits it on
// request: with pages of 4 KiB, reading it once in a call spends much of the time on looking up addresses.
inline void *allocate(int64_t bytes) {
    const bool large = bytes >= HUGE_PAGE;
    const int64_t alignment = large ? HUGE_PAGE : ALIGNMENT;
    void *block = std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(ceil_div(bytes, alignment) * alignment));
#if defined(MADV_HUGEPAGE)
    // Not the part of a page at the end, which would become resident as a whole. Memory that was in use before has small pages:
    // they are dropped.
    const size_t whole = static_cast<size_t>(bytes / HUGE_PAGE * HUGE_PAGE);
    if (block && large && madvise(block, whole, MADV_HUGEPAGE) == 0) madvise(block, whole, MADV_DONTNEED);
#endif
    return block;
}

class Workspace {
  public:
    ~Workspace() { std::free(block_); }

    // Null if there is no memory.
    char *at_least(int64_t bytes) {
        if (bytes > size_) {
            std::free(block_);
            size_ = 0;
            block_ = static_cast<char *>(allocate(bytes));
            if (block_) size_ = bytes;
        }
        return block_;
    }

    void shrink() {
        if (size_ <= KEPT_BYTES) return;
        std::free(block_);
        block_ = nullptr, size_ = 0;
    }

  private:
    char *block_ = nullptr;
    int64_t size_ = 0;
};

inline thread_local Workspace shared_memory, own_memory;

// Hands out consecutive pieces of a block, or, over a null block, adds up how much would be needed.
struct Carver {
    char *base;
    int64_t used = 0;

    template <class T> T *take(int64_t count) {
        T *piece = base ? reinterpret_cast<T *>(base + used) : nullptr;
        used += ceil_div(count * static_cast<int64_t>(sizeof(T)), ALIGNMENT) * ALIGNMENT;
        return piece;
    }
};

}  // namespace WK_NAMESPACE
}  // namespace wk
