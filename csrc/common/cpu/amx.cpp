#include "common/cpu/amx.h"

#ifdef SPEECHLM_HAVE_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace speechlm {
namespace amx {

#ifdef SPEECHLM_HAVE_AMX

namespace {

bool request() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if ((edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Config) == 64, "as the instruction reads it");

__attribute__((target("amx-tile"))) void configure() {
  static const Config config;
  _tile_loadconfig(&config);
}

__attribute__((target("amx-tile"))) void release() { _tile_release(); }

}  // namespace

bool enable() {
  static const bool is_granted = request();
  return is_granted;
}

Tiles::Tiles() { configure(); }
Tiles::~Tiles() { release(); }

#else

bool enable() { return false; }
Tiles::Tiles() = default;
Tiles::~Tiles() = default;

#endif

}  // namespace amx
}  // namespace speechlm
