#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "dualpipe/detail/pipeline/executor.hpp"

namespace dualpipe {

/// Remembers what each transfer has brought, so that a later run with the same inputs can expect it, and a device need
/// not wait until the sender's host has said what is coming.
class ArrivalMemory {
 public:
  /// @param data_dependent_from  the first stage whose shapes depend on data, as in Arrivals.
  ArrivalMemory(std::shared_ptr<Communicator> communicator, int data_dependent_from)
      : communicator_(std::move(communicator)), data_dependent_from_(data_dependent_from) {}

  /// Collective, where the communicator gains from knowing what comes; elsewhere it gives null and does nothing. Tells
  /// all ranks on what shapes depend here: signatures of the inputs and extras, and of the parameters, and which
  /// modules are in training. The function given waits for what the others say, and gives what was learned under the
  /// same conditions; what is missing there is to be filled in. Valid until the next call.
  ///
  /// @param plan    lives as long as this.
  /// @param module  has all stages of this rank below it.
  std::function<Arrivals&()> recall(const Plan& plan, const RunInputs& inputs, const torch::nn::Module& module);

 private:
  using Conditions = std::vector<std::int64_t>;  // a number of each rank
  static constexpr std::size_t kMost = 64;       // shapes that never repeat must not fill the memory

  std::shared_ptr<Communicator> communicator_;
  int data_dependent_from_;
  std::map<std::pair<const Plan*, Conditions>, Arrivals> learned_;
};

}  // namespace dualpipe
