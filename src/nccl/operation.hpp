#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "dualpipe/detail/comm/message.hpp"
#include "nccl/api.hpp"
#include "nccl/start_flags.hpp"

namespace dualpipe::detail {

/// A pooled event; it returns to its pool when the last reference goes.
using EventPtr = std::shared_ptr<std::remove_pointer_t<DeviceEvent>>;

/// A communicator of NCCL, and the stream on which its operations run.
struct CommStream {
  NcclComm comm = nullptr;
  DeviceStream stream = nullptr;
};

/// What both ends of a transfer, or all ranks of a collective, call the same: group, the group's first rank, sender,
/// receiver (-1 of a collective), sequence.
using OperationKey = std::array<std::int64_t, 5>;

/// One transfer or collective: first queued on the host, then launched on a stream.
struct NcclOperation {
  // Set before submit(), constant afterwards.
  Request request;                                ///< names the operation in errors
  std::vector<std::shared_ptr<Request>> headers;  ///< the peers' announcements
  bool waits_for_headers = true;                  ///< not launched before the announcements have come
  /// submit() polls briefly for announcements: an operation launched later allocates its result behind all work that
  /// the caller queues meanwhile.
  bool polls_for_headers = false;
  int blamed_rank = -1;  ///< origin of the error if the device does not finish in time; -1: none
  CommStream comm_stream;
  StartFlags::End* start = nullptr;             ///< starts when the other end has come too; null: at once
  int first_rank = 0;                           ///< of its group, in the world
  DeviceStream caller = nullptr;                ///< the current stream at the time of the call
  EventPtr ready;                               ///< the launch waits for it; null: recorded on `caller` after prepare()
  std::function<void(NcclOperation&)> prepare;  ///< allocates, right before the launch; may be null
  std::function<void(const NcclOperation&, NcclApi&, CommStream)> issue;  ///< calls NCCL; null: nothing to launch

  // Set by the launch.
  Tensors sources;  ///< the device reads these
  Tensors targets;  ///< the device writes these
  EventPtr begin;   ///< null: not timed
  EventPtr end;
  std::atomic<bool> launched{false};

  /// Seconds that it took for the last participant to come, who waited for none. Set by NcclContext::share_times().
  std::optional<double> shortest;
};

}  // namespace dualpipe::detail
