// Stencils as numbers, by the convention of nflows_kconv/stencil.py, which explains them.
//
// Bits 0 to 2 mirror columns, rows and planes; kSide distinguishes sides from corners; kExchanged exchanges rows and
// columns before mirroring. Stencils that differ only in their mirrors form a family, whose canonical frame has the
// rows, columns and kernel of `KernelProblem::in_frame_of`. There the pivot is in the last row of the kernel's last
// plane, the lag of a tap is how many planes, rows and columns back it reads, and the transposed operator has the same
// lags in `opposite`. An image is a volume of one plane, mirrored or not.
#pragma once

#include <cstdint>

namespace kconv {

constexpr int64_t kMirrorsColumns = 1, kMirrorsRows = 2, kMirrorsPlanes = 4, kSide = 8, kExchanged = 16;
constexpr int64_t kFamilies[] = {0, kSide, kSide | kExchanged};

constexpr int64_t kMirrorImages = 8;

inline int64_t mirrors(int64_t stencil) { return stencil & (kMirrorImages - 1); }
inline int64_t family(int64_t stencil) { return stencil - mirrors(stencil); }
inline int64_t opposite(int64_t stencil) { return stencil ^ (kMirrorImages - 1); }

// Returns the pivot's column in a canonical kernel.
inline int64_t pivot_column(int64_t stencil, int64_t kernel_width) {
  return stencil & kSide ? (kernel_width - 1) / 2 : kernel_width - 1;
}

struct Lag {  // of a tap, in units of the dilation
  int64_t planes, rows, columns;
};

}  // namespace kconv
