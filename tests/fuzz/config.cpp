// Options from JSON: read into their ranges, or refused.
#include "dualpipe/config.hpp"

#include "dualpipe/error.hpp"
#include "fuzz/target.hpp"

namespace dualpipe::fuzz {

void read(std::string_view text) {
  try {
    const DualPipeOptions options = DualPipeOptions::from_json(std::string(text));
    for (const int count : {options.num_micro_batches, options.num_ranks, options.chunks_per_rank, options.batch_dim})
      require(count >= 0, "no count is negative");
    for (const Merge& merge : options.merge_outputs) require(merge.dim >= 0, "no dimension is negative");
  } catch (const InvalidArgument& error) {
    require_readable(error.what());
  }
}

}  // namespace dualpipe::fuzz
