#include "two_units.hpp"

#include "dualpipe/dualpipe.hpp"
#include "dualpipe/schedule/generate.hpp"

std::string schedule_text(int num_ranks, int num_micro_batches) {
  return dualpipe::to_csv(
      dualpipe::make_schedule({.kind = "dualpipe", .num_ranks = num_ranks, .num_micro_batches = num_micro_batches}));
}

std::string error_text(int num_ranks, int num_micro_batches) {
  try {
    schedule_text(num_ranks, num_micro_batches);
    return "";
  } catch (const dualpipe::InvalidArgument& error) {
    return error.what();
  }
}
