// Finds accesses to the same memory, one of them a write, that no
// synchronization orders.
//
// Inside a block barriers order memory, inside a warp __syncwarp of all lanes
// does; between blocks of a launch, what one block did before a barrier and a
// store_release is ordered before what comes after the load_acquire that reads
// it.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <utility>

namespace emulator {

// Of other blocks: how many of their barriers are known to be passed.
using Knowledge = std::map<unsigned, int>;

inline void learn(Knowledge& knowledge, const Knowledge& more) {
  for (const auto& [block, barriers] : more) {
    int& known = knowledge[block];
    if (known < barriers) known = barriers;
  }
}

struct Access {
  bool present;
  unsigned block;
  int warp, thread;
  int barriers, syncwarps;  // passed before
  const void* code;
};

class Memory {
 public:
  Memory() = default;
  // A granule is the least that two threads may write at the same time, a power of two.
  Memory(const void* begin, long size, int granule)
      : begin_((const char*)begin), size_(size), shift_(__builtin_ctz(granule)) {
    granules_.reset((Granule*)calloc((size + granule - 1) / granule, sizeof(Granule)));
  }

  bool contains(const void* address) const { return address >= begin_ && address < begin_ + size_; }
  long offset(const void* address) const { return (const char*)address - begin_; }

  // Records an access; returns an earlier one that it is not ordered with, if
  // there is one, and whether that wrote.
  std::pair<const Access*, bool> record(const void* address, int size, bool writes, const Access& now,
                                        const Knowledge& own, const Knowledge& shared) {
    for (long i = offset(address) >> shift_; i <= (offset(address) + size - 1) >> shift_; i++) {
      Granule& granule = granules_[i];
      if (unordered(granule.written, now, own, shared)) return {&granule.written, true};
      if (writes) {
        if (unordered(granule.read, now, own, shared)) return {&granule.read, false};
        granule.written = now;
      } else if (unordered(granule.read, now, own, shared)) {
        // Several readers: of the warp, or else of any warps. A write by any
        // thread is unordered with one of them.
        granule.read.thread = kSeveral;
        if (granule.read.warp != now.warp || granule.read.block != now.block) granule.read.warp = kSeveral;
      } else {
        granule.read = now;
      }
    }
    return {nullptr, false};
  }

 private:
  static constexpr int kSeveral = -1;
  struct Granule {
    Access written, read;
  };
  struct Free {
    void operator()(Granule* granules) const { free(granules); }
  };

  static bool known(const Access& before, const Knowledge& knowledge) {
    const auto found = knowledge.find(before.block);
    return found != knowledge.end() && found->second > before.barriers;
  }

  static bool unordered(const Access& before, const Access& now, const Knowledge& own, const Knowledge& shared) {
    if (!before.present) return false;
    if (before.block != now.block) return !known(before, own) && !known(before, shared);
    if (before.barriers != now.barriers || before.thread == now.thread) return false;
    return before.warp != now.warp || before.syncwarps == now.syncwarps;
  }

  const char* begin_ = nullptr;
  long size_ = 0;
  int shift_ = 0;
  std::unique_ptr<Granule[], Free> granules_;  // from calloc, which only takes the pages that are used
};

}  // namespace emulator
