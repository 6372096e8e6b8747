// Trains a byte-level language model with DualPipe, one process per rank. See `dualpipe-lm --help`.

#include "command_line.hpp"
#include "dualpipe/error.hpp"
#include "model.hpp"
#include "trainer.hpp"

namespace {

constexpr const char* kDescription =
    "Trains a byte-level transformer language model with a pipeline schedule, one process per rank:\n"
    "  dualpipe-run -n 8 -- dualpipe-lm\n"
    "  torchrun --nproc-per-node 8 --no-python dualpipe-lm --schedule 1f1b --microbatches 16\n";

std::optional<example::Program> parse(int argc, const char* const* argv, std::string& help) {
  example::Options options;
  options.program = "dualpipe-lm";
  example::CommandLine line(kDescription, options);
  if (const auto text = line.parse(argc, argv)) {
    help = *text;
    return std::nullopt;
  }
  return example::Program{options, [size = options.model, seed = options.seed](const dualpipe::Mesh&) {
                            return example::Model{lm::layers_of(size, seed), lm::layer_costs(size),
                                                  lm::description(size)};
                          }};
}

}  // namespace

int main(int argc, char** argv) { return example::run_program(argc, argv, parse); }
