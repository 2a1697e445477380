// One share of the kernels for one instruction set: compiled with -DSET=... and -DSHARE="file".
#include "reduce.h"

#define PASTE_(name, set) kernel_##name##_##set
#define PASTE(name, set) PASTE_(name, set)
#define KERNEL(name) PASTE(name, SET)

namespace adamite {
#include SHARE
}  // namespace adamite
