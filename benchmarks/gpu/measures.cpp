#include "measures.hpp"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <time.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "device_activity.hpp"
#include "dualpipe/comm/local.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/pipeline/tracer.hpp"
#include "dualpipe/planner/report.hpp"
#include "nccl/communicator.hpp"
#include "nccl/cuda.hpp"
#include "nccl/forwarding.hpp"
#include "nccl/rank_device.hpp"
#include "planner/spans.hpp"
#include "resident_kernel.hpp"

namespace dualpipe::bench {
namespace {

using nlohmann::json;

using Clock = std::chrono::steady_clock;
using Ptr = std::shared_ptr<Communicator>;
using namespace std::chrono_literals;

void require_device() {
  std::string why;
  if (detail::cuda_device_count(why) < 1) throw Skipped("no CUDA device: " + why);
}

int num_devices() {
  std::string why;
  return detail::cuda_device_count(why);
}

/// Why two ranks of one process cannot use NCCL here; empty if they can.
std::string two_ranks_obstacle() {
  if (num_devices() >= 2) return "";
  const std::string same = detail::cuda_device_identity(0);
  return detail::sharing_obstacle({same, same}, detail::nccl_version(), std::getenv("NCCL_MULTI_RANK_GPU_ENABLE"));
}

/// Remembers the streams that a rank's communicator makes.
class WatchedDevice final : public test::ForwardingDevice {
 public:
  using ForwardingDevice::ForwardingDevice;
  detail::DeviceStream create_stream() override {
    const detail::DeviceStream stream = ForwardingDevice::create_stream();
    const std::lock_guard lock(mutex_);
    streams_.push_back(stream);
    return stream;
  }
  std::vector<detail::DeviceStream> streams() {
    const std::lock_guard lock(mutex_);
    return streams_;
  }

 private:
  std::mutex mutex_;
  std::vector<detail::DeviceStream> streams_;
};

/// Ranks that are threads, each with a stream of its own: over the local communicator and one device.
void run_local(int num_ranks, const std::function<void(const Ptr&)>& body) {
  run_ranks(num_ranks,
            [&](const Ptr& comm) {
              const c10::cuda::CUDAStreamGuard stream(c10::cuda::getStreamFromPool(false, comm->device().index()));
              body(comm);
              torch::cuda::synchronize(comm->device().index());
            },
            {.timeout = 60s, .device = at::kCUDA});
}

/// The same with NCCL between them, over the devices that there are.
void run_nccl(int num_ranks, const std::function<void(const Ptr&, WatchedDevice&)>& body) {
  run_ranks(num_ranks,
            [&](const Ptr& control) {
              const int index = control->rank() % num_devices();
              const c10::cuda::CUDAStreamGuard stream(
                  c10::cuda::getStreamFromPool(false, static_cast<at::DeviceIndex>(index)));
              const auto device = std::make_shared<WatchedDevice>(detail::cuda_device(index));
              const Ptr comm = detail::NcclCommunicator::world(
                  control, device, detail::nccl_library(index),
                  {.timeout = 60s, .name = "threads", .transfer_ctas = {.max = 4}, .collective_ctas = {.max = 4}});
              body(comm, *device);
              torch::cuda::synchronize(index);
            },
            {.timeout = 60s});
}

StageFactory linears(int width, int count) {
  return [=](int) {
    torch::nn::Sequential layers;
    for (int i = 0; i < count; ++i) {
      layers->push_back(torch::nn::Linear(torch::nn::LinearOptions(width, width).bias(false)));
      layers->push_back(torch::nn::Tanh());
    }
    layers->to(torch::kBFloat16);
    return layers;
  };
}

Batch batch_of(int rows, int width, at::Device device) {
  const auto options = torch::dtype(torch::kBFloat16).device(device);
  return {.inputs = {torch::full({rows, width}, 0.5, options)}, .targets = {torch::zeros({rows, width}, options)}};
}

const LossFn squared = [](const Tensors& outputs, const Tensors& targets) {
  return torch::mse_loss(outputs[0], targets[0]);
};

double thread_seconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.at(values.size() / 2);
}

double rounded(double value) { return std::round(value * 1000) / 1000; }

/// Of small stages, whose kernels are over before the host has launched the next. One op is one forward or one backward of a
/// micro-batch on a stage; each rank runs two for each micro-batch.
json host_time_of(const Ptr& comm, bool asynchronous) {
  constexpr int width = 64, rows = 4, num_micro_batches = 16, steps = 20;
  DualPipe pipe(comm,
                {.num_micro_batches = num_micro_batches,
                 .schedule = comm->size() == 1 ? "1f1b" : "dualpipe",
                 .on_non_finite = asynchronous ? OnNonFinite::keep : OnNonFinite::error,
                 .asynchronous = asynchronous},
                linears(width, 2));
  const Batch batch = batch_of(rows * num_micro_batches, width, comm->device());
  const auto run = [&](int count) {
    StepResult last;
    const auto begin = Clock::now();
    const double before = thread_seconds();
    for (int step = 0; step < count; ++step) last = pipe->step(batch, squared);
    const std::pair times{seconds_since(begin), thread_seconds() - before};
    last.wait();
    return times;
  };
  run(5);
  comm->barrier().wait();
  const double ops = 2.0 * num_micro_batches * steps;
  const auto [wall, processor] = run(steps);
  json result = {{"wall_us", rounded(1e6 * wall / ops)}, {"processor_us", rounded(1e6 * processor / ops)}};

  torch::cuda::synchronize(comm->device().index());
  comm->barrier().wait();
  std::optional<CudaCalls> calls;
  if (comm->rank() == 0) calls.emplace();
  comm->barrier().wait();
  run(steps);
  comm->barrier().wait();
  if (comm->rank() == 0) {
    double total = 0;
    json by_name;
    for (const auto& [name, count] : calls->counts()) {
      const double per_op = static_cast<double>(count) / (ops * comm->size());
      total += per_op;
      if (per_op >= 0.05) by_name[name] = rounded(per_op);
    }
    result["cuda_calls"] = rounded(total);
    result["by_name"] = by_name;
  }
  return result;
}

json host_times_of(const Ptr& comm) {
  json result = {{"synchronous", host_time_of(comm, false)}};
  result["asynchronous"] = host_time_of(comm, true);
  return result;
}

detail::TimeSpans spans_of(const std::vector<Kernel>& kernels, const std::vector<std::uint32_t>& streams, bool nccl) {
  detail::TimeSpans spans;
  for (const Kernel& kernel : kernels)
    if (std::find(streams.begin(), streams.end(), kernel.stream) != streams.end() &&
        kernel.name.starts_with("nccl") == nccl)
      spans.emplace_back(kernel.begin, kernel.end);
  return detail::merged(std::move(spans));
}

double share(double part, double whole) { return whole > 0 ? rounded(part / whole) : 0; }

/// Milliseconds of one matrix product, by events on the current stream.
double product_ms(const at::Tensor& a, const at::Tensor& b) {
  constexpr int products = 20;
  cudaEvent_t begin = nullptr, end = nullptr;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  at::Tensor out = torch::empty({a.size(0), b.size(1)}, a.options());
  CHECK_CUDA(cudaEventRecord(begin, stream));
  for (int i = 0; i < products; ++i) torch::mm_out(out, a, b);
  CHECK_CUDA(cudaEventRecord(end, stream));
  CHECK_CUDA(cudaEventSynchronize(end));
  float milliseconds = 0;
  CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  return milliseconds / products;
}

double median_of(int times, const std::function<double()>& measure) {
  std::vector<double> values;
  for (int i = 0; i < times; ++i) values.push_back(measure());
  return median(values);
}

/// A receive of NCCL that waits: two communicators of this process, of which the second sends when it is told to.
class WaitingReceive {
 public:
  explicit WaitingReceive(int blocks) {
    const auto id = detail::nccl_library(0)->unique_id();
    std::array<std::exception_ptr, 2> errors;
    std::vector<std::thread> threads;
    for (int rank = 0; rank < 2; ++rank)
      threads.emplace_back([&, rank] {
        try {
          End& end = ends_.at(rank);
          const int index = rank % num_devices();
          const c10::cuda::CUDAGuard guard(static_cast<at::DeviceIndex>(index));
          end.device = detail::cuda_device(index);
          end.nccl = detail::nccl_library(index);
          end.stream = end.device->create_stream();
          end.memory = torch::zeros({bytes}, torch::dtype(torch::kByte).device(torch::kCUDA, index));
          torch::cuda::synchronize(index);
          end.comm = end.nccl->init(2, id, rank, {.ctas = {.min = blocks, .max = blocks}, .name = "waiting"});
        } catch (...) {
          errors.at(rank) = std::current_exception();
        }
      });
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& error : errors)
      if (error) std::rethrow_exception(error);
    ends_[0].nccl->group_start();  // connects both, for which neither waits for the other
    receive();
    send();
    ends_[0].nccl->group_end();
    synchronize();
  }
  ~WaitingReceive() {
    for (End& end : ends_) {
      if (end.comm != nullptr) end.nccl->abort(std::array{end.comm});
      if (end.stream != nullptr) end.device->destroy(end.stream);
    }
  }
  WaitingReceive(const WaitingReceive&) = delete;
  WaitingReceive& operator=(const WaitingReceive&) = delete;

  void receive() {
    ends_[0].nccl->receive(ends_[0].memory.mutable_data_ptr(), bytes, 1, ends_[0].comm, ends_[0].stream);
  }
  void send() {
    const c10::cuda::CUDAGuard guard(ends_[1].device->device());
    ends_[1].nccl->send(ends_[1].memory.const_data_ptr(), bytes, 0, ends_[1].comm, ends_[1].stream);
  }
  void synchronize() {
    for (const End& end : ends_) torch::cuda::synchronize(end.device->device().index());
  }

 private:
  static constexpr std::int64_t bytes = std::int64_t{256} << 20;  // NCCL gives small ones few blocks
  struct End {
    std::shared_ptr<detail::DeviceApi> device;
    std::shared_ptr<detail::NcclApi> nccl;
    detail::DeviceStream stream = nullptr;
    at::Tensor memory;
    detail::NcclComm comm = nullptr;
  };
  std::array<End, 2> ends_;
};

}  // namespace

json versions() {
  int runtime = 0, driver = 0;
  CHECK_CUDA(cudaRuntimeGetVersion(&runtime));
  (void)cudaDriverGetVersion(&driver);  // 0 where there is none
  std::string why;
  const int devices = detail::cuda_device_count(why);
  json result = {{"libtorch", TORCH_VERSION},
                 {"nccl", detail::nccl_version_text(detail::nccl_version())},
                 {"nccl_headers", detail::nccl_version_text(NCCL_VERSION_CODE)},
                 {"cuda_runtime", runtime},
                 {"cuda_driver", driver},
                 {"devices", devices}};
  if (devices == 0) {
    result["no_device"] = why;
    return result;
  }
  cudaDeviceProp properties;
  CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
  result["device"] = properties.name;
  result["compute_capability"] = std::to_string(properties.major) + "." + std::to_string(properties.minor);
  result["multiprocessors"] = properties.multiProcessorCount;
  result["memory_gib"] = rounded(static_cast<double>(properties.totalGlobalMem) / (1 << 30));
  if (const std::string obstacle = two_ranks_obstacle(); !obstacle.empty()) result["one_rank_per_device"] = obstacle;
  return result;
}

json host_time() {
  require_device();
  json result;
  run_nccl(1, [&](const Ptr& comm, const auto&) { result["one_rank"] = host_times_of(comm); });
  run_local(2, [&](const Ptr& comm) {
    const json times = host_times_of(comm);
    if (comm->rank() == 0) result["two_threads_local"] = times;
  });
  if (const std::string obstacle = two_ranks_obstacle(); !obstacle.empty()) {
    result["two_threads_nccl"] = {{"skipped", obstacle}};
    return result;
  }
  run_nccl(2, [&](const Ptr& comm, const auto&) {
    const json times = host_times_of(comm);
    if (comm->rank() == 0) result["two_threads_nccl"] = times;
  });
  return result;
}

json hidden_share() {
  require_device();
  if (const std::string obstacle = two_ranks_obstacle(); !obstacle.empty()) throw Skipped(obstacle);
  constexpr int width = 4096, num_micro_batches = 16, rows = 512;
  const auto steps = [&](const Ptr& comm, DualPipe& pipe, int count) {
    const Batch batch = batch_of(rows * num_micro_batches, width, comm->device());
    for (int step = 0; step < count; ++step) {
      pipe->zero_grad();
      pipe->step(batch, squared);
    }
    torch::cuda::synchronize(comm->device().index());
  };
  run_local(2, [&](const Ptr& comm) {  // loads the kernels, of which none may be loaded while a receive waits
    DualPipe pipe(comm, {.num_micro_batches = num_micro_batches}, linears(width, 4));
    steps(comm, pipe, 1);
  });
  struct Streams {
    std::vector<std::uint32_t> compute, transfers;
  };
  std::array<Streams, 2> streams;
  std::vector<Kernel> kernels;
  Timeline timeline;
  run_nccl(2, [&](const Ptr& comm, WatchedDevice& device) {
    DualPipe pipe(comm, {.num_micro_batches = num_micro_batches}, linears(width, 4));
    const auto tracer = std::make_shared<Tracer>(comm->rank());
    pipe->add_observer(tracer);
    steps(comm, pipe, 3);
    Streams& mine = streams.at(comm->rank());
    const c10::cuda::CUDAGuard guard(comm->device());
    mine.compute = {stream_number(device.current_stream())};
    for (const detail::DeviceStream stream : device.streams()) mine.transfers.push_back(stream_number(stream));
    comm->barrier().wait();
    if (comm->rank() == 0) begin_kernel_times();
    comm->barrier().wait();
    steps(comm, pipe, 1);
    comm->barrier().wait();
    if (comm->rank() == 0) kernels = end_kernel_times();
    const Timeline all = gather(*comm, tracer->last());
    if (comm->rank() == 0) timeline = all;
    comm->barrier().wait();
  });
  std::array<detail::TimeSpans, 2> compute, resident;
  for (int rank = 0; rank < 2; ++rank) {
    compute[rank] = spans_of(kernels, streams[rank].compute, false);
    resident[rank] = spans_of(kernels, streams[rank].transfers, true);
    DUALPIPE_CHECK(!compute[rank].empty() && !resident[rank].empty(), "of ", kernels.size(),
                   " kernels none are known as compute or as transfers of rank ", rank);
  }
  // With two ranks data move while a kernel of each end is resident.
  const detail::TimeSpans moving = detail::common(resident[0], resident[1]);
  const planner::Report report = planner::report(timeline);
  json ranks = json::array();
  for (int rank = 0; rank < 2; ++rank) {
    const planner::Overlap& ours = report.ranks.at(rank).transfers;
    ranks.push_back(
        {{"resident_ms", rounded(1e3 * detail::length(resident[rank]))},
         {"moving_ms", rounded(1e3 * detail::length(moving))},
         {"compute_ms", rounded(1e3 * detail::length(compute[rank]))},
         {"hidden_by_kernels", share(detail::length(detail::common(moving, compute[rank])), detail::length(moving))},
         {"report_ms", rounded(1e3 * ours.total())},
         {"hidden_by_report", share(ours.hidden, ours.total())}});
  }
  return {{"step_ms", rounded(1e3 * report.makespan)}, {"shared_device", num_devices() < 2}, {"ranks", ranks}};
}

json waiting_receive() {
  require_device();
  cudaDeviceProp properties;
  CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
  const c10::cuda::CUDAStreamGuard stream(c10::cuda::getStreamFromPool(false, 0));
  const auto options = torch::dtype(torch::kBFloat16).device(torch::kCUDA, 0);
  // One wave of tiles of 128 by 256, if the library chooses these; and many.
  const std::vector<std::pair<std::string, std::array<at::Tensor, 2>>> products = {
      {"one_wave",
       {torch::randn({128 * properties.multiProcessorCount, 8192}, options), torch::randn({8192, 256}, options)}},
      {"8192_cubed", {torch::randn({8192, 8192}, options), torch::randn({8192, 8192}, options)}}};
  // One rank, whose steps communicate nothing: what else is on the device is what is measured.
  const Ptr comm = local_communicators(1, {.timeout = 60s, .device = at::Device(at::kCUDA, 0)})[0];
  DualPipe pipe(comm, {.num_micro_batches = 4, .schedule = "1f1b"}, linears(4096, 8));
  const Batch batch = batch_of(4 * 2048, 4096, comm->device());
  const auto step_ms = [&] {
    const auto begin = Clock::now();
    pipe->step(batch, squared);
    return 1e3 * seconds_since(begin);
  };
  const auto measure = [&] {
    json result;
    for (const auto& product : products) {
      const auto& factors = product.second;
      result[product.first + "_ms"] = rounded(median_of(5, [&] { return product_ms(factors[0], factors[1]); }));
    }
    result["step_ms"] = rounded(median_of(5, step_ms));
    return result;
  };
  measure();
  json result = {{"alone", measure()}};
  ResidentKernel resident;
  for (const int blocks : {1, 4, 16}) {
    resident.start(blocks);
    json with = measure();
    resident.stop();
    result["resident_blocks"][std::to_string(blocks)] = with;
  }
  if (const std::string obstacle = two_ranks_obstacle(); !obstacle.empty()) {
    result["nccl_receive"] = {{"skipped", obstacle}};
    return result;
  }
  for (const int blocks : {1, 4, 16}) {
    WaitingReceive transfer(blocks);
    begin_kernel_times();
    transfer.receive();
    transfer.send();
    transfer.synchronize();
    const std::vector<Kernel> kernels = end_kernel_times();
    transfer.receive();
    json with = measure();
    transfer.send();
    transfer.synchronize();
    for (const Kernel& kernel : kernels)
      if (kernel.name.starts_with("nccl")) with["blocks"] = kernel.blocks;
    result["nccl_receive"][std::to_string(blocks)] = with;
  }
  return result;
}

}  // namespace dualpipe::bench
