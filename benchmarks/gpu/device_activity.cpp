#include "device_activity.hpp"

#include <cupti.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace {

void check(CUptiResult result, const char* call) {
  if (result == CUPTI_SUCCESS) return;
  const char* text = nullptr;
  (void)cuptiGetResultString(result, &text);
  throw std::runtime_error(std::string("CUPTI: ") + (text != nullptr ? text : "unknown error") + " (" + call + ")");
}
#define CHECK_CUPTI(call) check(call, #call)

#if CUPTI_API_VERSION >= 130000
using KernelRecord = CUpti_ActivityKernel10;
#else
using KernelRecord = CUpti_ActivityKernel9;
#endif

// CUPTI knows one subscriber and one pair of buffer callbacks per process, without an argument for these.
struct {
  CUpti_SubscriberHandle subscriber = nullptr;
  std::array<std::atomic<std::int64_t>, 4096> calls{};
  std::array<std::atomic<const char*>, 4096> names{};
  std::mutex mutex;
  std::vector<Kernel> kernels;
} state;

void CUPTIAPI count(void*, CUpti_CallbackDomain, CUpti_CallbackId id, const void* data) {
  const auto& call = *static_cast<const CUpti_CallbackData*>(data);
  if (call.callbackSite != CUPTI_API_ENTER || id >= state.calls.size()) return;
  state.names[id].store(call.functionName, std::memory_order_relaxed);
  state.calls[id].fetch_add(1, std::memory_order_relaxed);
}

void CUPTIAPI give_buffer(std::uint8_t** buffer, std::size_t* bytes, std::size_t* most_records) {
  *bytes = std::size_t{4} << 20;
  *buffer = static_cast<std::uint8_t*>(std::aligned_alloc(64, *bytes));
  *most_records = 0;
}

void CUPTIAPI take_buffer(CUcontext, std::uint32_t, std::uint8_t* buffer, std::size_t, std::size_t valid) {
  CUpti_Activity* record = nullptr;
  const std::lock_guard lock(state.mutex);
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
    const auto& kernel = *reinterpret_cast<const KernelRecord*>(record);
    state.kernels.push_back({.name = kernel.name != nullptr ? kernel.name : "",
                             .device = kernel.deviceId,
                             .stream = kernel.streamId,
                             .blocks = kernel.gridX * kernel.gridY * kernel.gridZ,
                             .begin = 1e-9 * static_cast<double>(kernel.start),
                             .end = 1e-9 * static_cast<double>(kernel.end)});
  }
  std::free(buffer);
}

}  // namespace

CudaCalls::CudaCalls() {
  for (auto& calls : state.calls) calls = 0;
  CHECK_CUPTI(cuptiSubscribe(&state.subscriber, count, nullptr));
  if (const CUptiResult result = cuptiEnableDomain(1, state.subscriber, CUPTI_CB_DOMAIN_RUNTIME_API);
      result != CUPTI_SUCCESS) {
    (void)cuptiUnsubscribe(state.subscriber);
    check(result, "cuptiEnableDomain");
  }
}

CudaCalls::~CudaCalls() { (void)cuptiUnsubscribe(state.subscriber); }

std::map<std::string, std::int64_t> CudaCalls::counts() const {
  std::map<std::string, std::int64_t> counts;
  for (std::size_t id = 0; id < state.calls.size(); ++id) {
    if (const std::int64_t calls = state.calls[id]; calls > 0) {
      std::string name = state.names[id].load();
      counts[name.substr(0, name.rfind("_v"))] += calls;
    }
  }
  return counts;
}

void begin_kernel_times() {
  CHECK_CUPTI(cuptiActivityRegisterCallbacks(give_buffer, take_buffer));
  CHECK_CUPTI(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL));
  CHECK_CUPTI(cuptiActivityFlushAll(0));
  const std::lock_guard lock(state.mutex);
  state.kernels.clear();
}

std::vector<Kernel> end_kernel_times() {
  CHECK_CUPTI(cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED));
  CHECK_CUPTI(cuptiActivityDisable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL));
  const std::lock_guard lock(state.mutex);
  return std::exchange(state.kernels, {});
}

std::uint32_t stream_number(void* stream) {
  std::uint32_t number = 0;
  CHECK_CUPTI(cuptiGetStreamIdEx(nullptr, static_cast<CUstream>(stream), 0, &number));
  return number;
}
