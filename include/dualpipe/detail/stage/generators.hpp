#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "dualpipe/detail/config.hpp"

// Generators of LibTorch, each called under its mutex.
namespace dualpipe::detail {

/// LibTorch's own, of the CPU and, if it is another, of `device`.
DUALPIPE_DECL std::vector<at::Generator> default_generators(at::Device device);
DUALPIPE_DECL void set_seed(const std::vector<at::Generator>& generators, std::uint64_t seed);
DUALPIPE_DECL std::vector<at::Tensor> states_of(const std::vector<at::Generator>& generators);
DUALPIPE_DECL void set_states(const std::vector<at::Generator>& generators, const std::vector<at::Tensor>& states);

/// In the end generators have the states back that they have now.
class KeptStates {
 public:
  explicit KeptStates(std::vector<at::Generator> generators)
      : generators_(std::move(generators)), states_(states_of(generators_)) {}
  ~KeptStates() { set_states(generators_, states_); }
  KeptStates(const KeptStates&) = delete;
  KeptStates& operator=(const KeptStates&) = delete;

  const std::vector<at::Generator>& generators() const noexcept { return generators_; }

 private:
  std::vector<at::Generator> generators_;
  std::vector<at::Tensor> states_;
};

}  // namespace dualpipe::detail
