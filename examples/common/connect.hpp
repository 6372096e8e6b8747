#pragma once

#include <memory>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/launch/world.hpp"
#include "options.hpp"

namespace example {

/// Collective: all ranks of the world, on CPUs or on GPUs as the options ask.
///
/// @throws dualpipe::InvalidArgument  there is no GPU for every rank, this program was built without NCCL, or the
///                                    options slow down a network of GPUs.
std::shared_ptr<dualpipe::Communicator> connect(const dualpipe::World& world, const Options& options);

/// Replaces the running program by the one for GPU ranks, where the options ask for GPUs and it is not that one.
///
/// The two are made of the same code, but one of them is linked with dualpipe::nccl: it takes 0.25 s and 130 MB more
/// per rank to load, for nothing on CPUs. Returns where no such program lies beside this one; connect() says why then.
void become_gpu_program(const Options& options, const char* const* argv);

}  // namespace example
