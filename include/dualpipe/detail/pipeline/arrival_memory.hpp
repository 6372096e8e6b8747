#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"

namespace dualpipe::detail {

/// Remembers what each transfer brought. A device that knows what comes need not wait for the sender's header.
class ArrivalMemory {
 public:
  /// @param data_dependent_from  as in Arrivals.
  ArrivalMemory(std::shared_ptr<Communicator> communicator, int data_dependent_from)
      : communicator_(std::move(communicator)), data_dependent_from_(data_dependent_from) {}

  /// Collective where the communicator gains from known signatures; elsewhere does nothing and returns null.
  ///
  /// Sends a hash of everything that shapes depend on here: signatures of inputs, extras and parameters, and which
  /// modules are in training. The returned function waits for the hashes of all ranks and gives the arrivals of earlier
  /// runs with the same hashes, to be completed by this run. Valid until the next call.
  ///
  /// @param module  holds all stages of this rank.
  DUALPIPE_DECL std::function<Arrivals&()> known_arrivals(std::shared_ptr<const Plan> plan, const RunInputs& inputs,
                                                          const torch::nn::Module& module);

 private:
  using Conditions = std::vector<std::int64_t>;  // one hash per rank
  // Beyond this many, all are forgotten, so that shapes that never repeat do not fill the memory.
  static constexpr std::size_t max_entries = 64;

  std::shared_ptr<Communicator> communicator_;
  int data_dependent_from_;
  std::map<std::pair<std::shared_ptr<const Plan>, Conditions>, Arrivals> learned_;
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/arrival_memory.ipp"
#endif
