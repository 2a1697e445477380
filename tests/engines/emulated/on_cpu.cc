// The handlers for GPUs as a handler for CPUs, for tests: they are called as they are, and get a stream, which XLA has not
// for CPUs. There it calls no handler before a program runs, either: each call is `initialize`, then `execute`, which
// are to be set. EMULATED_STAGE names the one that is called, if it is one only.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Handler* execute = nullptr;
XLA_FFI_Handler* initialize = nullptr;
XLA_FFI_Error* EmulatedCall(XLA_FFI_CallFrame* frame);
}

namespace {

const XLA_FFI_Api* the_api;  // XLA's

// Each device has a stream, 1 and so on.
XLA_FFI_Error* GetStream(XLA_FFI_Stream_Get_Args* args) {
  XLA_FFI_DeviceOrdinal_Get_Args device{};
  device.struct_size = XLA_FFI_DeviceOrdinal_Get_Args_STRUCT_SIZE;
  device.ctx = args->ctx;
  if (XLA_FFI_Error* error = the_api->XLA_FFI_DeviceOrdinal_Get(&device)) return error;
  args->stream = reinterpret_cast<void*>(uintptr_t{1} + device.device_ordinal);
  return nullptr;
}

// XLA's functions, with another stream.
const XLA_FFI_Api* WithStream(const XLA_FFI_Api* api) {
  static const XLA_FFI_Api* changed = [api] {
    the_api = api;
    auto* bytes = new std::vector<char>(api->struct_size);
    std::memcpy(bytes->data(), api, api->struct_size);
    auto* its = reinterpret_cast<XLA_FFI_Api*>(bytes->data());
    its->XLA_FFI_Stream_Get = GetStream;
    return its;
  }();
  return changed;
}

bool IsWanted(const char* stage) {
  const char* wanted = std::getenv("EMULATED_STAGE");
  return wanted == nullptr || std::strcmp(wanted, stage) == 0;
}

}  // namespace

XLA_FFI_Error* EmulatedCall(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start != nullptr) return execute(frame);  // XLA asks what it can do
  XLA_FFI_CallFrame its = *frame;
  its.api = WithStream(frame->api);
  if (IsWanted("initialize")) {
    its.stage = XLA_FFI_ExecutionStage_INITIALIZE;
    if (XLA_FFI_Error* error = initialize(&its)) return error;
    its.stage = frame->stage;
  }
  return IsWanted("execute") ? execute(&its) : nullptr;
}
