#include "nccl/cuda.hpp"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <nccl.h>
#include <nvtx3/nvToolsExt.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>

// Throws DeviceFailure with the library's text if the call fails.
#define DUALPIPE_CUDA_CHECK(call)                                                                       \
  do {                                                                                                  \
    const cudaError_t result_ = (call);                                                                 \
    if (result_ != cudaSuccess) [[unlikely]] {                                                          \
      (void)cudaGetLastError();                                                                         \
      throw DeviceFailure(                                                                              \
          str("CUDA: ", cudaGetErrorName(result_), ": ", cudaGetErrorString(result_), " (" #call ")")); \
    }                                                                                                   \
  } while (false)

#define DUALPIPE_NCCL_CHECK(comm, call)                                                            \
  do {                                                                                             \
    const ncclResult_t result_ = (call);                                                           \
    if (result_ != ncclSuccess) [[unlikely]]                                                       \
      throw DeviceFailure(str("NCCL: ", ncclGetErrorString(result_), ": ", ncclGetLastError(comm), \
                              " (" #call "); NCCL_DEBUG=WARN says more"));                         \
  } while (false)

namespace dualpipe::detail {
namespace {

cudaStream_t real(DeviceStream stream) { return reinterpret_cast<cudaStream_t>(stream); }
cudaEvent_t real(DeviceEvent event) { return reinterpret_cast<cudaEvent_t>(event); }
ncclComm_t real(NcclComm comm) { return reinterpret_cast<ncclComm_t>(comm); }

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Sets the device without throwing. After a sticky error, such as a kernel's, it cannot be set; then frees happen
/// without it, or fail.
class QuietGuard {
 public:
  explicit QuietGuard(at::Device device) noexcept {
    try {
      watchdog_.set_device(device);
    } catch (...) {
      // The next call that may throw reports it.
    }
  }

 private:
  c10::cuda::OptionalCUDAGuard watchdog_;
};

/// The driver's calls that queue a flag's write and wait. The runtime has none, and a program that links the driver
/// starts only where there is one.
class FlagCalls {
 public:
  FlagCalls() : write_(entry("cuStreamWriteValue32")), wait_(entry("cuStreamWaitValue32")) {}
  void write(cudaStream_t stream, DeviceFlag& flag, std::uint32_t value) const {
    check(write_(stream, address(flag), value, CU_STREAM_WRITE_VALUE_DEFAULT), "cuStreamWriteValue32");
  }
  void wait(cudaStream_t stream, const DeviceFlag& flag, std::uint32_t value) const {
    check(wait_(stream, address(flag), value, CU_STREAM_WAIT_VALUE_GEQ), "cuStreamWaitValue32");
  }

 private:
  using Call = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned int);
  static_assert(sizeof(DeviceFlag) == sizeof(cuuint32_t));

  static Call entry(const char* name) {
    constexpr unsigned int since = 11070;  // this form of both calls
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    DUALPIPE_CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &found, since, cudaEnableDefault, &result));
    if (found == nullptr) throw DeviceFailure(str("CUDA: the driver has no ", name));
    return reinterpret_cast<Call>(found);
  }
  /// Page-locked memory has one address for hosts and devices.
  static CUdeviceptr address(const DeviceFlag& flag) { return reinterpret_cast<CUdeviceptr>(&flag); }
  static void check(CUresult result, const char* call) {
    if (result == CUDA_SUCCESS) return;
    const auto error = static_cast<cudaError_t>(result);  // the same numbers
    throw DeviceFailure(str("CUDA: ", cudaGetErrorName(error), ": ", cudaGetErrorString(error), " (", call, ")"));
  }

  Call write_, wait_;
};

class CudaDevice final : public DeviceApi {
 public:
  explicit CudaDevice(int index) : device_(at::kCUDA, static_cast<at::DeviceIndex>(index)) {}
  ~CudaDevice() override {
    const QuietGuard guard(device_);
    if (anchor_ != nullptr) (void)cudaEventDestroy(anchor_);
    if (clock_ != nullptr) (void)cudaStreamDestroy(clock_);
  }

  at::Device device() const override { return device_; }
  DeviceStream current_stream() override {
    return reinterpret_cast<DeviceStream>(c10::cuda::getCurrentCUDAStream(device_.index()).stream());
  }
  DeviceStream create_stream() override { return reinterpret_cast<DeviceStream>(new_stream()); }
  void destroy(DeviceStream stream) noexcept override {
    const QuietGuard guard(device_);
    (void)cudaStreamDestroy(real(stream));
  }

  DeviceEvent create_event(bool timed) override {
    const c10::cuda::CUDAGuard guard(device_);
    cudaEvent_t event = nullptr;
    DUALPIPE_CUDA_CHECK(cudaEventCreateWithFlags(&event, timed ? cudaEventDefault : cudaEventDisableTiming));
    return reinterpret_cast<DeviceEvent>(event);
  }
  void destroy(DeviceEvent event) noexcept override {
    const QuietGuard guard(device_);
    (void)cudaEventDestroy(real(event));
  }
  void record(DeviceEvent event, DeviceStream stream) override {
    const c10::cuda::CUDAGuard guard(device_);
    DUALPIPE_CUDA_CHECK(cudaEventRecord(real(event), real(stream)));
  }
  void wait(DeviceStream stream, DeviceEvent event) override {
    const c10::cuda::CUDAGuard guard(device_);
    DUALPIPE_CUDA_CHECK(cudaStreamWaitEvent(real(stream), real(event), 0));
  }
  bool done(DeviceEvent event) override {
    const c10::cuda::CUDAGuard guard(device_);
    const cudaError_t result = cudaEventQuery(real(event));
    if (result == cudaErrorNotReady) {
      (void)cudaGetLastError();
      return false;
    }
    DUALPIPE_CUDA_CHECK(result);
    return true;
  }

  /// Measured from an anchor event whose host time is known. CUDA gives the difference as float milliseconds, so the
  /// anchor is renewed every few seconds.
  double time_of(DeviceEvent event) override {
    constexpr double longest = 5;
    const std::lock_guard lock(clock_mutex_);
    const c10::cuda::CUDAGuard guard(device_);
    if (anchor_ == nullptr || now() - anchored_ > longest) {
      if (clock_ == nullptr) clock_ = new_stream();
      if (anchor_ == nullptr) DUALPIPE_CUDA_CHECK(cudaEventCreate(&anchor_));
      DUALPIPE_CUDA_CHECK(cudaEventRecord(anchor_, clock_));
      DUALPIPE_CUDA_CHECK(cudaEventSynchronize(anchor_));
      anchored_ = now();
    }
    float milliseconds = 0;
    DUALPIPE_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, anchor_, real(event)));
    return anchored_ + milliseconds * 1e-3;
  }

  std::shared_ptr<DeviceFlag[]> create_flags(std::size_t count) override {
    const c10::cuda::CUDAGuard guard(device_);
    if (!flag_calls_) flag_calls_.emplace();
    void* memory = nullptr;
    DUALPIPE_CUDA_CHECK(
        cudaHostAlloc(&memory, count * sizeof(DeviceFlag), cudaHostAllocPortable | cudaHostAllocMapped));
    auto* const flags = static_cast<DeviceFlag*>(memory);
    std::uninitialized_value_construct_n(flags, count);
    return {flags, [device = device_](DeviceFlag* freed) {
              const QuietGuard quiet(device);
              (void)cudaFreeHost(freed);
            }};
  }
  void write_flag(DeviceStream stream, DeviceFlag& flag, std::uint32_t value) override {
    const c10::cuda::CUDAGuard guard(device_);
    flag_calls_->write(real(stream), flag, value);
  }
  void wait_for_flag(DeviceStream stream, const DeviceFlag& flag, std::uint32_t value) override {
    const c10::cuda::CUDAGuard guard(device_);
    flag_calls_->wait(real(stream), flag, value);
  }

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, DeviceStream stream) override {
    const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromExternal(real(stream), device_.index()));
    return at::empty(sizes, at::device(device_).dtype(dtype));
  }

  void copy(const at::Tensor& to, const at::Tensor& from, DeviceStream stream) override {
    const c10::cuda::CUDAGuard guard(device_);
    DUALPIPE_CUDA_CHECK(cudaMemcpyAsync(to.mutable_data_ptr(), from.const_data_ptr(), to.nbytes(),
                                        cudaMemcpyDeviceToDevice, real(stream)));
  }

  void push_range(const std::string& name) override { nvtxRangePushA(name.c_str()); }
  void pop_range() override { nvtxRangePop(); }

 private:
  cudaStream_t new_stream() const {
    const c10::cuda::CUDAGuard guard(device_);
    int lowest = 0;
    int highest = 0;
    DUALPIPE_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
    cudaStream_t stream = nullptr;
    DUALPIPE_CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highest));
    return stream;
  }

  const at::Device device_;
  std::optional<FlagCalls> flag_calls_;  // from create_flags() on
  std::mutex clock_mutex_;
  cudaStream_t clock_ = nullptr;
  cudaEvent_t anchor_ = nullptr;
  double anchored_ = 0;
};

ncclDataType_t nccl_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kByte:
      return ncclUint8;
    case at::kChar:
      return ncclInt8;
    case at::kInt:
      return ncclInt32;
    case at::kLong:
      return ncclInt64;
    case at::kHalf:
      return ncclFloat16;
    case at::kBFloat16:
      return ncclBfloat16;
    case at::kFloat:
      return ncclFloat32;
    case at::kDouble:
      return ncclFloat64;
    default:
      throw DeviceFailure(str("NCCL adds up no ", c10::toString(dtype)));
  }
}

ncclRedOp_t nccl_reduction(Reduce reduce) {
  switch (reduce) {
    case Reduce::sum:
      return ncclSum;
    case Reduce::max:
      return ncclMax;
    case Reduce::min:
      return ncclMin;
  }
  return ncclSum;
}

class NcclLibrary final : public NcclApi {
 public:
  explicit NcclLibrary(int device_index) : device_(at::kCUDA, static_cast<at::DeviceIndex>(device_index)) {}

  NcclId unique_id() override {
    ncclUniqueId id;
    DUALPIPE_NCCL_CHECK(nullptr, ncclGetUniqueId(&id));
    NcclId bytes;
    static_assert(sizeof id == std::tuple_size_v<NcclId>);
    std::memcpy(bytes.data(), &id, sizeof id);
    return bytes;
  }

  NcclComm init(int num_ranks, const NcclId& bytes, int rank, const NcclConfig& wanted) override {
    const c10::cuda::CUDAGuard guard(device_);
    ncclUniqueId id;
    std::memcpy(&id, bytes.data(), sizeof id);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 1;
    const auto [min_ctas, max_ctas] = wanted.ctas;
    if (min_ctas > 0) config.minCTAs = min_ctas;
    if (max_ctas > 0) config.maxCTAs = max_ctas;
    // NCCL refuses a minimum without a maximum.
    if (min_ctas > 0 && max_ctas == 0) config.maxCTAs = std::max(min_ctas, largest_cta_count);
    config.commName = keep(wanted.name);
    ncclComm_t comm = nullptr;
    DUALPIPE_NCCL_CHECK(nullptr, ncclCommInitRankConfig(&comm, num_ranks, id, rank, &config));
    return reinterpret_cast<NcclComm>(comm);
  }
  void destroy(NcclComm comm) override {
    const c10::cuda::CUDAGuard guard(device_);
    DUALPIPE_NCCL_CHECK(nullptr, ncclCommDestroy(real(comm)));
  }
  // In a group NCCL 2.22 and later stops all communicators before it waits for the first. It sets their devices by itself,
  // behind that: a guard here might wait for a kernel that only the abort ends.
  void abort(std::span<const NcclComm> comms) noexcept override {
    (void)ncclGroupStart();
    for (const NcclComm comm : comms) (void)ncclCommAbort(real(comm));
    (void)ncclGroupEnd();
  }
  std::optional<std::string> async_error(NcclComm comm) override {
    ncclResult_t state = ncclSuccess;
    DUALPIPE_NCCL_CHECK(real(comm), ncclCommGetAsyncError(real(comm), &state));
    if (state == ncclSuccess || state == ncclInProgress) return std::nullopt;
    return str(ncclGetErrorString(state), ": ", ncclGetLastError(real(comm)));
  }

  void group_start() override { DUALPIPE_NCCL_CHECK(nullptr, ncclGroupStart()); }
  void group_end() override {
    const c10::cuda::CUDAGuard guard(device_);
    DUALPIPE_NCCL_CHECK(nullptr, ncclGroupEnd());
  }
  void send(const void* data, std::size_t bytes, int peer, NcclComm comm, DeviceStream stream) override {
    DUALPIPE_NCCL_CHECK(real(comm), ncclSend(data, bytes, ncclUint8, peer, real(comm), real(stream)));
  }
  void receive(void* data, std::size_t bytes, int peer, NcclComm comm, DeviceStream stream) override {
    DUALPIPE_NCCL_CHECK(real(comm), ncclRecv(data, bytes, ncclUint8, peer, real(comm), real(stream)));
  }
  void broadcast(void* data, std::size_t bytes, int root, NcclComm comm, DeviceStream stream) override {
    DUALPIPE_NCCL_CHECK(real(comm), ncclBroadcast(data, data, bytes, ncclUint8, root, real(comm), real(stream)));
  }
  void all_reduce(void* data, std::size_t count, at::ScalarType dtype, Reduce reduce, NcclComm comm,
                  DeviceStream stream) override {
    DUALPIPE_NCCL_CHECK(real(comm), ncclAllReduce(data, data, count, nccl_type(dtype), nccl_reduction(reduce),
                                                  real(comm), real(stream)));
  }

 private:
  static constexpr int largest_cta_count = 64;  // NCCL's own limit

  /// NCCL keeps the pointer to a communicator's name.
  const char* keep(const std::string& name) {
    const std::lock_guard lock(names_mutex_);
    return names_.emplace_back(name).c_str();
  }

  const at::Device device_;
  std::mutex names_mutex_;
  std::deque<std::string> names_;
};

}  // namespace

int cuda_device_count(std::string& why) {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result != cudaSuccess) {
    (void)cudaGetLastError();
    why = cudaGetErrorString(result);
    return 0;
  }
  why = count > 0 ? "" : "CUDA_VISIBLE_DEVICES may hide them";
  return count;
}

std::string cuda_device_identity(int index) {
  cudaDeviceProp properties;
  DUALPIPE_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  constexpr char digits[] = "0123456789abcdef";
  std::string text;
  for (const char byte : properties.uuid.bytes) {
    const auto value = static_cast<unsigned char>(byte);
    text += {digits[value / 16], digits[value % 16]};
  }
  return text;
}

std::shared_ptr<DeviceApi> cuda_device(int index) { return std::make_shared<CudaDevice>(index); }

int nccl_version() {
  int version = 0;
  DUALPIPE_NCCL_CHECK(nullptr, ncclGetVersion(&version));
  return version;
}

std::shared_ptr<NcclApi> nccl_library(int device_index) {
  const int loaded = nccl_version();
  Dl_info where{};
  const bool found = dladdr(reinterpret_cast<void*>(&ncclGetVersion), &where) != 0 && where.dli_fname != nullptr;
  const std::string problem =
      nccl_version_problem(NCCL_VERSION_CODE, loaded, found ? where.dli_fname : "an unknown file");
  if (!problem.empty()) throw DeviceFailure(problem);
  return std::make_shared<NcclLibrary>(device_index);
}

}  // namespace dualpipe::detail
