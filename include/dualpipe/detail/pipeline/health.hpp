#pragma once

#include <exception>
#include <memory>
#include <string>
#include <utility>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/error_text.hpp"
#include "dualpipe/detail/pipeline/unfinished_step.hpp"

namespace dualpipe::detail {

/// Whether a pipeline can still be used, and why not.
class Health {
 public:
  explicit Health(std::shared_ptr<Communicator> communicator) : communicator_(std::move(communicator)) {}

  /// Runs `body`, which communicates. Whatever it throws ends all ranks, and this pipeline for good.
  ///
  /// @throws Error  in place of an InvalidArgument of `body`, which would say that the caller can correct it and go on.
  template <class Body>
  auto guarded(const Body& body) {
    try {
      return body();
    } catch (const InvalidArgument& error) {
      failed(error.what());
      std::throw_with_nested(Error(error.what()));
    } catch (const std::exception& error) {
      failed(message_of(error));
      throw;
    } catch (...) {
      failed("an exception that is no std::exception");
      throw;
    }
  }

  /// Before a call does anything: no step before has failed, not even on its device since.
  ///
  /// @throws Error      an earlier call failed.
  /// @throws CommError  the device failed in the step before.
  void require() {
    if (!reason_.empty())
      throw Error(
          "an earlier step failed and its communicator is unusable; make a new one and a new DualPipe. It was: " +
          reason_);
    if (const auto step = std::exchange(unfinished_, nullptr)) guarded([&] { step->check(); });
  }

  /// The device has still to finish this step.
  void watch(std::shared_ptr<UnfinishedStep> step) { unfinished_ = std::move(step); }

 private:
  void failed(std::string reason) {
    reason_ = reason.empty() ? "an exception without a text" : std::move(reason);
    communicator_->abort(reason_);
  }

  std::shared_ptr<Communicator> communicator_;
  std::string reason_;  // why no call is possible; empty: it is
  std::shared_ptr<UnfinishedStep> unfinished_;
};

}  // namespace dualpipe::detail
