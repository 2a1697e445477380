// Where the kernel of a text is: the folder EMULATED_FOLDER, and a name by the hash of the text (FNV-1a, 64 bits).
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

inline std::string KernelOf(const char* text, const char* end) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const char* p = text; *p; ++p) hash = (hash ^ static_cast<unsigned char>(*p)) * 0x100000001B3u;
  char name[17];
  std::snprintf(name, sizeof name, "%016llx", static_cast<unsigned long long>(hash));
  const char* folder = std::getenv("EMULATED_FOLDER");
  return std::string(folder ? folder : ".") + "/" + name + end;
}
