#pragma once

/// What a program that trains needs. More, by name: dualpipe/comm/nccl.hpp (GPU ranks), dualpipe/pipeline/pair.hpp (pairs by
/// hand), dualpipe/schedule/ (schedules as data), dualpipe/planner/ (costs, pictures, reports), dualpipe/testing/
/// (networks for tests).

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/comm/local.hpp"
#include "dualpipe/comm/pending.hpp"
#include "dualpipe/comm/socket.hpp"
#include "dualpipe/config.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/launch/failure.hpp"
#include "dualpipe/launch/world.hpp"
#include "dualpipe/pipeline/batch.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/pipeline/group_collectives.hpp"
#include "dualpipe/pipeline/observer.hpp"
#include "dualpipe/pipeline/tracer.hpp"
#include "dualpipe/stage/as_stage.hpp"
#include "dualpipe/stage/collective.hpp"
#include "dualpipe/stage/partition.hpp"
#include "dualpipe/stage/random.hpp"
#include "dualpipe/stage/stage.hpp"
#include "dualpipe/train/checkpoint.hpp"
#include "dualpipe/train/clip.hpp"
#include "dualpipe/train/grad_scaler.hpp"
#include "dualpipe/train/learning_rate.hpp"
#include "dualpipe/train/master_weights.hpp"
#include "dualpipe/train/mesh.hpp"
#include "dualpipe/train/metrics.hpp"
#include "dualpipe/train/safetensors.hpp"
#include "dualpipe/train/sharded_optimizer.hpp"
#include "dualpipe/version.hpp"
