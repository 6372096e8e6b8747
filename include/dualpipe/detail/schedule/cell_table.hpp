#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/op.hpp"

namespace dualpipe::detail {

/// A cell of the grid of ranks and steps.
struct CellPlace {
  int rank = -1;
  int cell = -1;
  explicit operator bool() const { return rank >= 0; }
};

/// Cells are counted from 1 in what people read.
inline std::string to_string(const CellPlace& place) { return str("cell ", place.cell + 1, " of rank ", place.rank); }

inline constexpr std::array all_passes = {Pass::Forward, Pass::BackwardInput, Pass::BackwardWeight, Pass::Backward};

inline std::optional<std::ptrdiff_t> pass_index(Pass pass) {
  const auto found = std::find(all_passes.begin(), all_passes.end(), pass);
  if (found == all_passes.end()) return std::nullopt;
  return found - all_passes.begin();
}

/// Where the passes of one stage and micro-batch stand.
struct CellPasses {
  std::array<CellPlace, all_passes.size()> places;

  const CellPlace& operator[](Pass pass) const { return places[*pass_index(pass)]; }
  Pass gradient_pass() const { return (*this)[Pass::Backward] ? Pass::Backward : Pass::BackwardInput; }
  CellPlace any() const {
    const auto found = std::find_if(places.begin(), places.end(), [](const CellPlace& place) { return bool(place); });
    return found == places.end() ? CellPlace{} : *found;
  }
};

/// Where everything stands, by stage and micro-batch.
class CellTable {
 public:
  CellTable() = default;
  CellTable(int num_stages, int num_micro_batches)
      : num_micro_batches_(num_micro_batches), cells_(std::int64_t{num_stages} * num_micro_batches) {}

  CellPasses& operator()(int stage, int micro_batch) { return cells_[index(stage, micro_batch)]; }
  const CellPasses& operator()(int stage, int micro_batch) const { return cells_[index(stage, micro_batch)]; }
  CellPlace operator()(const Op& op) const { return (*this)(op.stage, op.micro_batch)[op.pass]; }

  std::int64_t index(int stage, int micro_batch) const {
    return std::int64_t{stage} * num_micro_batches_ + micro_batch;
  }
  std::size_t size() const { return cells_.size(); }

 private:
  int num_micro_batches_ = 0;
  std::vector<CellPasses> cells_;
};

}  // namespace dualpipe::detail
