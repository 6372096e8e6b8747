// Goes on from the last checkpoint and saves one after the other, until it is killed: `saver FOLDER alone|ranks`.
#include <cstdio>
#include <filesystem>
#include <string>

#include "dualpipe/comm/local.hpp"
#include "dualpipe/train/checkpoint.hpp"
#include "train/seeded_run.hpp"

namespace dualpipe::test {
namespace {

template <class Model>
void save_forever(const std::string& folder, Model& model, bool asynchronous, bool speaks) {
  torch::optim::AdamW optimizer(model->parameters());
  int step = 0;
  if (!std::filesystem::is_empty(folder)) step = static_cast<int>(load_checkpoint(folder, model, optimizer).step);
  CheckpointWriter writer(folder, {.keep = 2, .asynchronous = asynchronous});
  for (;;) {
    seeded_step(*model, optimizer, ++step);
    writer.save(model, optimizer, {.step = step});
    if (speaks) {
      std::printf("saving %d\n", step);
      std::fflush(stdout);
    }
  }
}

}  // namespace
}  // namespace dualpipe::test

int main(int argc, char** argv) {
  using namespace dualpipe::test;  // NOLINT(google-build-using-namespace)
  if (argc != 3) return 2;
  const std::string folder = argv[1];
  torch::set_num_threads(1);
  if (std::string(argv[2]) == "alone") {
    Whole model;
    save_forever(folder, model, false, true);
  } else {
    dualpipe::run_ranks(2, [&](const std::shared_ptr<dualpipe::Communicator>& comm) {
      dualpipe::DualPipe pipe = layered_pipe(comm, "dualpipe");
      save_forever(folder, pipe, true, comm->rank() == 0);
    });
  }
}
