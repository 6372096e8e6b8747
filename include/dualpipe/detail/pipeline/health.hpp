#pragma once

#include <exception>
#include <memory>
#include <string>
#include <utility>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/error_text.hpp"
#include "dualpipe/detail/files.hpp"
#include "dualpipe/detail/pipeline/flight_recorder.hpp"
#include "dualpipe/detail/pipeline/unfinished_step.hpp"

namespace dualpipe::detail {

/// Whether a pipeline can still be used, and why not.
class Health {
 public:
  /// @param recorder     outlives this.
  /// @param record_path  a file for what `recorder` holds when the pipeline fails; empty: none.
  Health(std::shared_ptr<Communicator> communicator, FlightRecorder& recorder, std::string record_path)
      : communicator_(std::move(communicator)), recorder_(recorder), record_path_(std::move(record_path)) {}

  /// Runs `body`, which communicates. Whatever it throws ends all ranks, and this pipeline for good.
  ///
  /// @throws CommError  of `body`.
  /// @throws Error      in place of everything else, with this rank and its last operations; an InvalidArgument would
  ///                    say that the caller can correct it and go on.
  template <class Body>
  auto guarded(const Body& body) {
    try {
      return body();
    } catch (const CommError& error) {
      rethrow(error);
    } catch (...) {
      std::string text = current_error_text();
      if (!text.starts_with("rank ")) text = str("rank ", communicator_->world_rank(communicator_->rank()), ": ", text);
      if (const std::string last = recorder_.last_lines(); !last.empty())
        text += (text.ends_with('\n') ? "  " : "\n  ") + last;
      const std::string note = failed(text, /*threw=*/true);
      std::throw_with_nested(Error(text + note));
    }
  }

  /// The same of what a CommError ends and other exceptions, which all ranks throw, do not.
  template <class Body>
  auto watched(const Body& body) {
    try {
      return body();
    } catch (const CommError& error) {
      rethrow(error);
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
  /// What is being handled.
  [[noreturn]] void rethrow(const CommError& error) {
    const std::string note = failed(error.what(), /*threw=*/false);
    if (note.empty()) throw;
    std::throw_with_nested(CommError(error.origin_rank(), error.operation(), error.what() + note));
  }
  /// @return  to be added to the error of this rank; the others have theirs by then.
  std::string failed(std::string reason, bool threw) {
    if (!reason_.empty()) return {};  // what follows from it is no news
    reason_ = reason.empty() ? "an exception without a text" : std::move(reason);
    communicator_->abort(reason_);
    recorder_.set_failure(reason_, threw);
    if (record_path_.empty()) return {};
    try {
      write_file(record_path_, recorder_.to_json());
      return {};
    } catch (const std::exception& error) {
      return str("\n  The record of this rank is lost: ", error.what());
    }
  }

  std::shared_ptr<Communicator> communicator_;
  FlightRecorder& recorder_;
  std::string record_path_;
  std::string reason_;  // why no call is possible; empty: it is
  std::shared_ptr<UnfinishedStep> unfinished_;
};

}  // namespace dualpipe::detail
