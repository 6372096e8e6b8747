#include "two_units.hpp"

#include <utility>

#include "dualpipe/dualpipe.hpp"
#include "dualpipe/schedule/generate.hpp"

// A user's own names stay usable beside `using namespace dualpipe`.
struct Edge {};
struct Family {};
struct Link {};
struct Piece {};
struct Report {};
struct Side {};
struct Window {};
int compare() { return 0; }
int memory() { return 0; }
int report() { return 0; }
int search() { return 0; }

namespace {
using namespace dualpipe;
struct Own {
  Edge edge;
  Family family;
  Link link;
  Piece piece;
  Report report;
  Side side;
  Window window;
};
[[maybe_unused]] auto own_names() { return std::pair(Own(), compare() + memory() + report() + search()); }
}  // namespace

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
