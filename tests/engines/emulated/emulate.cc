// One printed kernel on a CPU: KERNEL is its file.
#include "shim.h"

#include KERNEL

static thread_local const Table* the_table;

static void Body() {
  adamite_step(*the_table);
  Warp& warp = *the_warp;
  warp.done[warp.now] = true;
  swapcontext(&warp.lane[warp.now], &warp.home);
}

// Runs the CTAs of a launch, one after the other; 1: the lanes of a warp went different ways around a meeting.
// `flush`: subnormals are 0, as on CPUs under XLA; a GPU keeps them.
extern "C" int run(const Table* table, unsigned ctas, int flush) {
  const unsigned csr = _mm_getcsr();
  if (flush) _mm_setcsr(csr | 0x8040u);
  Warp warp;
  the_warp = &warp;
  the_table = table;
  for (unsigned cta = 0; cta < ctas; ++cta) {
    for (unsigned number = 0; number < WARPS; ++number) {
      blockIdx.x = cta;
      for (int k = 0; k < 32; ++k) {
        getcontext(&warp.lane[k]);
        warp.lane[k].uc_stack.ss_sp = warp.stacks.data() + (k << 16);
        warp.lane[k].uc_stack.ss_size = 1 << 16;
        warp.lane[k].uc_link = nullptr;
        makecontext(&warp.lane[k], Body, 0);
        warp.done[k] = false;
      }
      for (int left = 32; left > 0;) {
        int waiting = 0;
        for (int k = 0; k < 32; ++k) {
          if (warp.done[k]) continue;
          warp.now = k;
          threadIdx.x = number * 32 + k;
          swapcontext(&warp.home, &warp.lane[k]);
          if (warp.done[k]) --left;
          else ++waiting;
        }
        if (waiting != 0 && waiting != 32) {
          _mm_setcsr(csr);
          return 1;
        }
        warp.result = 0;
        for (int k = 0; waiting && k < 32; ++k) warp.result = max(warp.result, warp.value[k]);
      }
    }
  }
  _mm_setcsr(csr);
  return 0;
}
