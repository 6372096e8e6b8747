#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/comm/agree.hpp"

namespace dualpipe::detail {

/// The ranks that share a checkpoint; one process alone has no communicator.
class CheckpointGroup {
 public:
  explicit CheckpointGroup(std::shared_ptr<Communicator> communicator) : communicator_(std::move(communicator)) {}

  int rank() const { return communicator_ ? communicator_->rank() : 0; }
  int size() const { return communicator_ ? communicator_->size() : 1; }

  /// By rank: the number among all ranks, as errors name it.
  std::vector<int> numbers() const { return communicator_ ? world_ranks(*communicator_) : std::vector{0}; }

  /// Collective: every rank's text, by rank.
  std::vector<std::string> gather(const std::string& text) const {
    return communicator_ ? all_gather_text(*communicator_, text) : std::vector{text};
  }
  /// Collective: throws on every rank what `body`, which does not communicate, throws on any.
  template <class Body>
  void on_all(const Body& body) const {
    throw_findings(gather(finding_of(body)), numbers());
  }
  /// The same of a body that only one rank runs.
  template <class Body>
  void on_rank(int rank, const Body& body) const {
    on_all([&] {
      if (rank == this->rank()) body();
    });
  }

 private:
  std::shared_ptr<Communicator> communicator_;
};

}  // namespace dualpipe::detail
