#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "nccl/communicator.hpp"

namespace dualpipe::detail {

/// The Pending of one flight: what remains to be done on the caller's thread.
class NcclOperation final : public Pending::State {
 public:
  using Finish = std::function<Tensors(Flight&)>;
  struct Parts {
    std::optional<NcclFamily::QueueId> queue = std::nullopt;  ///< none: nothing is launched
    std::shared_ptr<Flight> flight = nullptr;
    Watch watched = {};       ///< what the caller must not write to before wait()
    Finish finish = nullptr;  ///< on the stream that waited; makes what take() gives
  };

  NcclOperation(std::shared_ptr<NcclFamily> family, Parts parts);

  void wait() override;
  void synchronize() override;
  bool done() const override;
  Tensors take() override;
  Span span() const override;

 private:
  bool launched() const;
  void finish();
  void order(DeviceStream stream, const EventPtr& event);

  std::shared_ptr<NcclFamily> family_;
  Parts parts_;
  Tensors result_;
  bool finished_ = false;
  bool taken_ = false;
};

}  // namespace dualpipe::detail
