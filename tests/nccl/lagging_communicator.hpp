#pragma once

#include <torch/torch.h>

#include <cstring>
#include <memory>
#include <utility>

#include "emulated_rank.hpp"

namespace dualpipe::test {

/// What a rank has asked of its device.
struct CallCounts {
  bool late = false;
  int host_waits = 0;  ///< waits of the host for the device, one per read of values
  int sends = 0, receives = 0, collectives = 0;
  int expected = 0;                       ///< receives with an expected signature
  std::vector<Signature> collected = {};  ///< signatures of the collectives
};

/// Lets host code use a device that lags behind. Kernels copy the tensors of each call to memory of the rank's stream,
/// and results back, so that all values depend on events.
class LaggingCommunicator final : public Communicator {
 public:
  LaggingCommunicator(std::shared_ptr<Communicator> inner, std::shared_ptr<AsyncRank> rank)
      : LaggingCommunicator(std::move(inner), std::move(rank), std::make_shared<CallCounts>()) {}
  /// From now on a kernel writes results of in-place collectives to the host's tensors and the host does not wait, as
  /// on a real device: nobody may read them before the stream has run it.
  void write_results_late() { counts_->late = true; }
  /// The counts since the last call, of this communicator and all its splits.
  CallCounts take_counts() { return std::exchange(*counts_, {.late = counts_->late}); }

  at::Device device() const override { return at::kCPU; }
  Communicator& control() override { return inner_->control(); }
  bool gains_from_expected() const noexcept override { return inner_->gains_from_expected(); }
  DeviceTrace* device_trace() noexcept override { return inner_->device_trace(); }
  void connect(const std::vector<Edge>& edges) override { inner_->connect(edges); }
  Pending send(int peer, Tensors tensors) override {
    ++counts_->sends;
    return lag(inner_->send(peer, on_device(tensors)), {});
  }
  Pending receive(int peer, const std::optional<Expected>& expected) override {
    ++counts_->receives;
    if (expected) ++counts_->expected;
    return lag(inner_->receive(peer, expected), {});
  }
  Pending all_reduce(Tensors tensors, Reduce reduce) override {
    note_collective(tensors);
    return lag(inner_->all_reduce(on_device(tensors), reduce), tensors);
  }
  Pending broadcast(Tensors tensors, int root) override {
    note_collective(tensors);
    return lag(inner_->broadcast(on_device(tensors), root), tensors);
  }
  Pending all_gather(at::Tensor tensor, const std::optional<Signature>& expected) override {
    note_collective({tensor});
    return lag(inner_->all_gather(on_device({tensor})[0], expected), {});
  }
  Pending all_to_all(Tensors tensors, const std::optional<Signature>& expected) override {
    note_collective(tensors);
    return lag(inner_->all_to_all(on_device(tensors), expected), {});
  }
  Pending barrier() override { return inner_->barrier(); }
  std::vector<std::string> commit(std::string ballot) override { return inner_->commit(std::move(ballot)); }
  Pending fence() override { return inner_->fence(); }
  std::shared_ptr<Communicator> split(int color, int key) override { return split_for({}, color, key); }
  std::shared_ptr<Communicator> split_for(const GroupUse& use, int color, int key) override {
    auto part = inner_->split_for(use, color, key);
    return part == nullptr
               ? nullptr
               : std::shared_ptr<LaggingCommunicator>(new LaggingCommunicator(std::move(part), rank_, counts_));
  }
  void abort(const std::string& reason) noexcept override { inner_->abort(reason); }

 private:
  LaggingCommunicator(std::shared_ptr<Communicator> inner, std::shared_ptr<AsyncRank> rank,
                      std::shared_ptr<CallCounts> counts)
      : Communicator(inner->rank(), inner->size()),
        inner_(std::move(inner)),
        rank_(std::move(rank)),
        counts_(std::move(counts)) {}
  void note_collective(const Tensors& tensors) {
    ++counts_->collectives;
    counts_->collected.push_back(signature_of(tensors));
  }

  /// Copies made by kernels; `in_place` are the host's tensors that receive results.
  class State final : public Pending::State {
   public:
    State(Pending inner, std::shared_ptr<AsyncRank> rank, std::shared_ptr<CallCounts> counts, Tensors in_place)
        : inner_(std::move(inner)),
          rank_(std::move(rank)),
          counts_(std::move(counts)),
          in_place_(std::move(in_place)) {}
    void wait() override {
      if (over_) return inner_.wait();
      if (in_place_.empty()) {
        inner_.wait();
        return;
      }
      results_ = counts_->late ? write_late() : fetch();
      over_ = true;
    }
    bool done() const override { return inner_.done(); }
    Tensors take() override {
      if (!over_) results_ = fetch();
      over_ = true;
      return std::move(results_);
    }
    Span span() const override { return inner_.span(); }

   private:
    Tensors write_late() {
      const Tensors got = inner_.take();
      rank_->run([got, into = in_place_] {
        for (std::size_t i = 0; i < got.size(); ++i)
          if (got[i].defined() && got[i].numel() > 0)
            std::memcpy(into[i].mutable_data_ptr(), got[i].const_data_ptr(), got[i].nbytes());
      });
      return in_place_;
    }
    Tensors fetch() {
      const torch::NoGradGuard no_grad;
      const Tensors got = inner_.take();
      Tensors on_host;
      for (const at::Tensor& tensor : got)
        on_host.push_back(tensor.defined() ? torch::empty_like(tensor, at::MemoryFormat::Contiguous) : at::Tensor());
      rank_->run([got, on_host] {
        for (std::size_t i = 0; i < got.size(); ++i)
          if (got[i].defined() && got[i].numel() > 0)
            std::memcpy(on_host[i].mutable_data_ptr(), got[i].const_data_ptr(), got[i].nbytes());
      });
      if (!got.empty()) ++counts_->host_waits;
      rank_->synchronize();
      for (std::size_t i = 0; i < got.size(); ++i) {
        if (!got[i].defined()) continue;
        if (in_place_.empty()) {
          on_host[i].set_requires_grad(got[i].requires_grad());
        } else {
          in_place_[i].copy_(on_host[i]);
        }
      }
      inner_.wait();  // throws after an abort
      return in_place_.empty() ? on_host : in_place_;
    }

    Pending inner_;
    std::shared_ptr<AsyncRank> rank_;
    std::shared_ptr<CallCounts> counts_;
    Tensors in_place_, results_;
    bool over_ = false;
  };

  Pending lag(Pending inner, Tensors in_place) {
    return Pending(std::make_shared<State>(std::move(inner), rank_, counts_, std::move(in_place)));
  }

  Tensors on_device(const Tensors& tensors) {
    const torch::NoGradGuard no_grad;
    Tensors copies;
    for (const at::Tensor& tensor : tensors) {
      if (!tensor.defined()) {
        copies.emplace_back();
        continue;
      }
      const at::Tensor source = tensor.detach().contiguous().clone();
      at::Tensor copy = rank_->empty(source.sizes(), source.scalar_type());
      if (source.numel() > 0)
        rank_->run([source, into = copy.mutable_data_ptr()] {
          std::this_thread::sleep_for(std::chrono::microseconds(20));
          std::memcpy(into, source.const_data_ptr(), source.nbytes());
        });
      copies.push_back(copy.set_requires_grad(tensor.requires_grad()));
    }
    return copies;
  }

  std::shared_ptr<Communicator> inner_;
  std::shared_ptr<AsyncRank> rank_;
  std::shared_ptr<CallCounts> counts_;
};

}  // namespace dualpipe::test
