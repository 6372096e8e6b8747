#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/comm/socket.hpp"
#include "dualpipe/launch/world.hpp"

namespace dualpipe {

struct NcclOptions {
  /// Name, epoch and timeout of the communicator, and the store where ranks find each other. The timeout of an
  /// operation counts from wait(), and includes the device's part. The thread that tells others that this rank lives also
  /// launches operations, in which the driver may keep it for a while, so silence lasts longer before it means something.
  ConnectOptions connect = {.liveness = std::chrono::minutes(1)};
  int device = -1;  ///< CUDA device of this rank; -1: the world's local rank
  /// A communicator and a stream for each edge that connect() announces: their transfers run at the same time, and each
  /// takes its own memory and thread blocks. False: one for all edges, whose transfers run one after the other.
  bool communicator_per_edge = false;
  /// A transfer on an edge that connect() announced starts on both devices when both have come to it. False: where it
  /// comes first it starts at once, and its kernel occupies thread blocks until the other end comes. Costs each transfer
  /// the time that two messages of the control plane take. Needs CUDA_DEVICE_MAX_CONNECTIONS=32 in the environment, and
  /// NCCL_LAUNCH_ORDER_IMPLICIT unset.
  bool start_when_both_ready = false;
  /// Most thread blocks of one transfer between stages, each of which occupies a multiprocessor; 0: NCCL's choice.
  int max_transfer_ctas = 4;
  /// The same of one collective: of stages, and of all communicators but those that sum gradients.
  int max_collective_ctas = 4;
  /// The same of a sum of gradients, under which little else runs.
  int max_sum_ctas = 0;
  /// Fewest thread blocks of a collective and of a sum; 0: NCCL's choice. A transfer is not concerned: NCCL gives it
  /// blocks by its size and the number of ranks per host.
  int min_ctas = 0;
  /// Several ranks may use one device. Needs NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1 in the environment.
  bool share_devices = false;
};

/// Connects the processes of `world`, each with a CUDA device, by NCCL. Collective. The ranks also keep the sockets of
/// connect_sockets, over which they announce what they move and learn of each other's failures.
///
/// Beyond the communicator's contract:
///  * Events order everything. send() sends what the current stream has computed; wait() makes the stream wait that is
///    current then. The host waits only for headers: in a receive without an expected signature, in a collective, and
///    for each signature the first time. Any thread of the library may launch an operation.
///  * If wait() is called on another stream than the operation, the operation's stream waits for that one, as it owns
///    the memory.
///  * Transfers of one communicator run one after the other: all ranks must issue them in one global order, as DualPipe
///    does. Wrong: a receive() before the send() on both of two ranks. With communicator_per_edge that is allowed on
///    announced edges.
///  * Transfers on edges that connect() did not announce share the communicator of the collectives: all ranks must
///    issue both in one order.
///  * Nothing is buffered: a send completes when its receive has begun and the data has moved.
///  * A sum over more than two ranks is bitwise equal on all ranks, but in NCCL's order, not in rank order.
///  * It works on its own device and leaves the current device alone. torch::kCUDA without a number means the current
///    device, at first 0: call c10::cuda::set_device(communicator->device().index()) before code that says so.
///  * barrier() synchronizes hosts, not devices.
///  * After an abort, streams continue with data that never came. After waiting for the device, call wait() on a
///    Pending before using the results; DualPipe does so before it commits a step.
///
/// Needs the target dualpipe::nccl. Never falls back to another back end.
///
/// @throws InvalidArgument  built without NCCL; no CUDA device, more local ranks than devices, or a device taken twice.
/// @throws CommError        as connect_sockets; NCCL failed on some rank.
#if defined(DUALPIPE_WITH_NCCL)
std::shared_ptr<Communicator> connect_nccl(const World& world, const NcclOptions& options = {});
#else
inline std::shared_ptr<Communicator> connect_nccl(const World& /*world*/, const NcclOptions& /*options*/ = {}) {
  throw InvalidArgument(
      "this program was built without NCCL, so it has no GPU ranks: link it with dualpipe::nccl, which CMake offers "
      "where LibTorch is a CUDA build, or use connect_sockets");
}
#endif

}  // namespace dualpipe
