#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "nccl/communicator.hpp"

namespace dualpipe::detail {

/// The Pending of one operation: the part of its work that belongs on the caller's thread.
class NcclPending final : public Pending::State {
 public:
  using Finish = std::function<Tensors(NcclOperation&)>;
  struct Parts {
    std::optional<NcclContext::QueueId> queue = std::nullopt;  ///< none: nothing to launch
    std::shared_ptr<NcclOperation> operation = nullptr;
    Watch watched = {};       ///< tensors that the caller must not write to before wait()
    Finish finish = nullptr;  ///< runs on the waiting stream; returns the result of take()
  };

  NcclPending(std::shared_ptr<NcclContext> context, Parts parts);

  void wait() override;
  void synchronize() override;
  bool done() const override;
  Tensors take() override;
  Span span() const override;

 private:
  bool launched() const;
  void finish();
  void order(DeviceStream stream, const EventPtr& event);

  std::shared_ptr<NcclContext> context_;
  Parts parts_;
  Tensors result_;
  bool finished_ = false;
  bool taken_ = false;
};

}  // namespace dualpipe::detail
