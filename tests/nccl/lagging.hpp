#pragma once

#include <torch/torch.h>

#include <memory>
#include <utility>

#include "async_rank.hpp"

namespace dualpipe::test {

/// What a rank has asked of its device.
struct Asked {
  bool late = false;
  int host_waits = 0;  ///< of the host for the device: each time that values are read
  int sends = 0, receives = 0, collectives = 0;
  int expected = 0;                       ///< receives that knew what would come
  std::vector<Signature> collected = {};  ///< what the collectives moved
};

/// Lets host code use a device that lags behind. What it sends or reduces is written by a kernel into memory of the
/// rank's stream when the stream comes to it, what it gets is read by one; so everything between depends on events.
class Lagging final : public Communicator {
 public:
  Lagging(std::shared_ptr<Communicator> inner, std::shared_ptr<AsyncRank> rank)
      : Lagging(std::move(inner), std::move(rank), std::make_shared<Asked>()) {}
  /// From now on results of collectives in place are written to the host's tensors by a kernel, as on a real device,
  /// and the host does not wait for it: nobody may read them before the rank's stream has come there.
  void write_results_late() { asked_->late = true; }
  /// Since it was called last; groups that were split off included.
  Asked asked() { return std::exchange(*asked_, {.late = asked_->late}); }

  at::Device device() const override { return at::kCPU; }
  Communicator& control() override { return inner_->control(); }
  bool gains_from_expected() const noexcept override { return inner_->gains_from_expected(); }
  DeviceTrace* device_trace() noexcept override { return inner_->device_trace(); }
  void connect(const std::vector<Edge>& edges) override { inner_->connect(edges); }
  Pending send(int peer, Tensors tensors) override {
    ++asked_->sends;
    return lag(inner_->send(peer, on_device(tensors)), {});
  }
  Pending receive(int peer, const std::optional<Expected>& expected) override {
    ++asked_->receives;
    if (expected) ++asked_->expected;
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
  Pending fence() override { return inner_->fence(); }
  std::shared_ptr<Communicator> split(int color, int key) override {
    auto part = inner_->split(color, key);
    return part == nullptr ? nullptr : std::shared_ptr<Lagging>(new Lagging(std::move(part), rank_, asked_));
  }
  void abort(const std::string& reason) noexcept override { inner_->abort(reason); }

 private:
  Lagging(std::shared_ptr<Communicator> inner, std::shared_ptr<AsyncRank> rank, std::shared_ptr<Asked> asked)
      : Communicator(inner->rank(), inner->size()),
        inner_(std::move(inner)),
        rank_(std::move(rank)),
        asked_(std::move(asked)) {}
  void note_collective(const Tensors& tensors) {
    ++asked_->collectives;
    asked_->collected.push_back(signature_of(tensors));
  }

  /// Copies made by kernels, and the tensors of the host that results go into.
  class State final : public Pending::State {
   public:
    State(Pending inner, std::shared_ptr<AsyncRank> rank, std::shared_ptr<Asked> asked, Tensors in_place)
        : inner_(std::move(inner)), rank_(std::move(rank)), asked_(std::move(asked)), in_place_(std::move(in_place)) {}
    void wait() override {
      if (over_) return inner_.wait();
      if (in_place_.empty()) {
        inner_.wait();
        return;
      }
      results_ = asked_->late ? write_late() : fetch();
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
      if (!got.empty()) ++asked_->host_waits;
      rank_->synchronize();
      for (std::size_t i = 0; i < got.size(); ++i) {
        if (!got[i].defined()) continue;
        if (in_place_.empty()) {
          on_host[i].set_requires_grad(got[i].requires_grad());
        } else {
          in_place_[i].copy_(on_host[i]);
        }
      }
      inner_.wait();  // an abort meanwhile
      return in_place_.empty() ? on_host : in_place_;
    }

    Pending inner_;
    std::shared_ptr<AsyncRank> rank_;
    std::shared_ptr<Asked> asked_;
    Tensors in_place_, results_;
    bool over_ = false;
  };

  Pending lag(Pending inner, Tensors in_place) {
    return Pending(std::make_shared<State>(std::move(inner), rank_, asked_, std::move(in_place)));
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
  std::shared_ptr<Asked> asked_;
};

}  // namespace dualpipe::test
