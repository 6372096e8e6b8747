#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/comm/socket.hpp"
#include "dualpipe/launch/world.hpp"

namespace dualpipe {

struct NcclOptions {
  /// Name, epoch and timeout of the communicator, and the store where ranks find each other. The timeout counts from
  /// wait(), for what the device has to do as well.
  ConnectOptions connect = {};
  int device = -1;  ///< CUDA device of this rank; -1: the world's local rank
  /// Transfers of each announced edge on a communicator and a stream of their own: more of them run at once, and each
  /// takes its own memory and thread blocks. False: one for all, on which transfers run one after the other.
  bool communicator_per_edge = false;
  int max_ctas = 4;  ///< thread blocks, and so multiprocessors, that one operation may take; 0: NCCL's choice
  int min_ctas = 0;  ///< and at least takes; 0: NCCL's choice
  /// Several ranks may use one device. Needs NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1 in the environment.
  bool share_devices = false;
};

/// Connects the processes of `world`, each with a CUDA device, by NCCL. Collective. Beside NCCL there are the sockets
/// of connect_sockets, over which ranks agree on what will be moved and learn of each other's failures.
///
/// What it promises beyond the communicator's contract, and what it asks for:
///  * Everything is ordered by events. send() takes the tensors as the current stream leaves them, wait() makes the
///    stream wait that is current then, the host waits for headers only: those of receives without an expected
///    signature, of collectives, and of any signature the first time. Work is launched by whichever thread learns
///    first that it can be. Called on another stream than the operation was, wait() makes that one wait in turn, as it
///    owns the memory.
///  * All ranks must issue their transfers in one global order, as DualPipe does: they run one after the other.
///    Wrong: on both of two ranks a receive() before the send(). With communicator_per_edge this is allowed between
///    announced edges.
///  * A send is over when its receiver has come; nothing is buffered.
///  * A sum over more than two ranks is bitwise the same on all of them, in NCCL's order, not in rank order.
///  * It works on its device whatever device is current, and leaves that to the program. torch::kCUDA without a number
///    means the current device, which is 0 at first: call c10::cuda::set_device(communicator->device().index()) before
///    stages or losses that say so, as programs under torchrun do.
///  * barrier() is one of the hosts: it says nothing about devices.
///  * After an abort, streams go on with data that never came. Whoever waits for the device must call wait() on a
///    Pending afterwards, before believing what was computed; DualPipe does so before it commits a step.
///
/// Needs the target dualpipe::nccl. Never falls back to anything else.
///
/// @throws InvalidArgument  built without NCCL; no CUDA device, fewer than local ranks, or one taken twice.
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
